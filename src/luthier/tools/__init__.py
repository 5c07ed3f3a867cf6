"""The docs pages and the site, the doctor, the matrix of what tuners can do."""
