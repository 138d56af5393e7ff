"""A pipeline for Daydream Scope: the engine in its process, or a remote Causal Forcing server.

Scope finds :mod:`causal_forcing.scope.plugin` through the entry point group ``scope``. Nothing here is imported unless
Scope does so, and nothing outside this folder knows of Scope. What is needed of Scope is stated in
:mod:`causal_forcing.scope.interface`.
"""
