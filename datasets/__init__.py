"""Which videos, captions and questions there are: one's own, the published sets, the embedded toy
world.
"""
