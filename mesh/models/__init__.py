"""Model files: what they say of themselves. Reads headers, never tensor data; knows no process and no request."""
