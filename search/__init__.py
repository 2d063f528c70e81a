"""Find a moment in one's own videos: a query and the index that it asks."""
