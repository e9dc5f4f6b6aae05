"""One operation a file: a public function, its float32 reference in plain PyTorch (`_ref`), and its fast path."""
