"""Plain Python shared by every room: requests, results, options, errors. Imports neither torch nor transformers."""
