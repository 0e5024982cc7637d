"""Accounts of people: invitations, passwords, logins, limits and deletion."""
