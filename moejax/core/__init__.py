"""Shared structs, meshes, memory kinds, config overlays and version shims."""
