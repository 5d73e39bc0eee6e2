"""The row "shop": an access token in the page's memory, a refresh cookie, several devices."""
