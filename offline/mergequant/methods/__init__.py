"""The method's steps as pure functions: tensors in, a named result out. A paper section a file."""
