"""What a run needs beside its loop: processes, checkpoints, a log, other people's weights."""
