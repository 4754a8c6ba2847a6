"""The systems that are measured, each a module that its worker process alone imports."""
