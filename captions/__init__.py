"""What a caption says: words, parts of speech, relations; and its tokens for the model."""
