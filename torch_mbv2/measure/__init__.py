"""Measuring: whole networks and single layers against their rivals, profiles, pictures, reports."""
