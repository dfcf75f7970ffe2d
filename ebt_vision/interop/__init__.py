"""Networks of other restoration libraries as denoisers, and denoisers as theirs."""
