"""A run in one HTML file that somebody who was not there can read: ``dltrain debug report``."""
