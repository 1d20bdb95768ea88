"""The method's steps as pure functions: tensors in, a named result out. One paper section a file."""
