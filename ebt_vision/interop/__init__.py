"""Networks of other restoration libraries as Denoisers, and our Denoisers in these libraries."""
