"""Keye inside other people's programs; nothing else in the package imports from here."""
