"""Compile for named accelerators without owning one, and read facts from the result."""
