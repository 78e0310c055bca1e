"""Fixtures that are lopsided on purpose, each named for the mistake that a symmetric one lets through."""
