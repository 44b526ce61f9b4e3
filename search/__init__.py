"""The driver: decides which allocation is scored next and keeps the record. Imports no torch."""
