"""A stand-in for Daydream Scope: what the plugin touches of it, written from the interface it states."""
