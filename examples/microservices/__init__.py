"""The row "microservices": a gateway, a server that signs, two services that verify by themselves."""
