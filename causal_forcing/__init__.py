"""Causal Forcing: an autoregressive video diffusion engine with explicit session state (torch only)."""
