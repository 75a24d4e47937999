"""For all tests: the order in which they run."""


def pytest_collection_modifyitems(items):
    """Those of a minute first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
