"""Who may do what: identity, tenants and their limits, moderation, and the record of what was used."""
