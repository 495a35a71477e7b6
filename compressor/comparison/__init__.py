"""Several packed files beside each other: which are worth having, and a page, pictures and tables of them."""
