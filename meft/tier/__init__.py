"""A tier of rows on the device: those that are used often are read, kept with their moments, and stepped there.

The host's tables keep their full size, and everything that reads or writes them through `SharedRows.synchronize` gets
the tier's rows written back first ("settled"): there is one truth at a time. `residency` says which rows are worth a
place; `row_pool` is memory for so many rows; `layer_tier` reads and steps the rows of one layer, `layer_places` brings
them and takes them back; `row_tier` divides one budget among the layers and changes who has a place between steps.

The order of the hand-overs. All that reads or writes the pools is queued in the order of the computation: gathering,
steps, and copies to and from buffers of their own, which the copy streams fill and empty. A row that leaves is written
home by the thread of the row updates, behind the update of its table, which every access to the table waits for; a row
that enters is read by the same job, after that update, and has its place once the computation has landed it.

Threads beside the computation may take rows back at any time but within a step of an optimizer (`Places.lock`). A
thread that has asked for a table's rows keeps an alias of them (`KeptRows.at_home`) until it has read or written: while
anybody else has one, no row of the table gets a place. What leaves is kept on the device until it is home.
"""
