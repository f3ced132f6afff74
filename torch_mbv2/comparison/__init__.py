"""Comparing two forms of one model: whole outputs, layer by layer, and by patching parts."""
