"""Models on disk: validation of untrusted files, sources, reading, durable writing. Torch is loaded by `read` alone."""
