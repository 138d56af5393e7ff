"""The gateway: what speaks gRPC and HTTP, and the sessions it drives."""
