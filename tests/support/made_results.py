"""Results of a made-up device, for the tests of what is made of them."""


def finding(what, measured="1 GB/s", holds=None, part="probe", target="", **values):
    return {"part": part, "what": what, "measured": measured, "holds": holds, "target": target, "values": values}


def results_of(*found, rehearsal=False, parts=(), machine=None, files=None):
    machine = {"gpu": "NVIDIA X9", "torch": "9"} if machine is None else machine
    return {
        "version": 1, "rehearsal": rehearsal, "began": "2030-01-02T03:04:05+00:00", "machine": machine,
        "source": {"commit": "", "digest": "d"}, "parts": list(parts), "findings": list(found), "files": files or {},
    }  # fmt: skip
