// A browser may keep a page in memory for the back button although it says no-store. After the session has ended,
// here or elsewhere, nothing of it may be seen again: the page is hidden when it is left, and asked for anew.
"use strict";
addEventListener("pagehide", () => {
  document.documentElement.hidden = true;
});
addEventListener("pageshow", (event) => {
  if (event.persisted) {
    location.reload();
  }
});
