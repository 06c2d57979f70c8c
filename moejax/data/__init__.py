"""Recorded routing and text: what models are fed with and what their routers chose."""
