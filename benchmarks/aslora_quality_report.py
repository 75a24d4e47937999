def write(path, rows, planned):
    pass
