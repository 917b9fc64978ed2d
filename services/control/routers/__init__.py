"""The endpoints: each parses, calls one function and returns."""
