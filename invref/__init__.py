"""invref: activation layers that run backward from their output, and the proof of how exact their gradient is."""
