"""Parts of the kernel for the gradients of a chunk's inputs."""
