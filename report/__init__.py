"""The page that shows what a model finds and where it fails."""
