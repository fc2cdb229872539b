"""Mutation tests of everything that is read from outside; campaign.py says what a case is."""
