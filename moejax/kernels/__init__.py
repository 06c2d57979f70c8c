"""Single-device operations of a mixture-of-experts layer, one folder each.

In every folder `api.py` picks an implementation and says which, `reference.py` is obviously right,
and each further file is one backend.
"""
