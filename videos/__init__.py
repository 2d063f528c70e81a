"""What a video file shows: frames, decoded once, in processes that may die."""
