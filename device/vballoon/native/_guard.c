// SPDX-License-Identifier: Apache-2.0
/*
 * A SIGBUS handler for mappings of files that other processes own.
 *
 * A front-end can truncate a file after it was mapped here, and a page of a full tmpfs cannot be
 * faulted in: both end an access with SIGBUS.  A handler in Python never runs, because the
 * interpreter returns to the faulting instruction before it looks at signals.  This one maps a zero
 * page where the access failed and counts the fault; the instruction then succeeds, and whoever
 * asked for it looks at the counter afterwards and stops the queues of that guest.
 *
 * The handler takes no lock and allocates nothing.  Slots are written under the GIL; the handler
 * may run on any thread at any instruction, so `end` is stored last when a slot is filled and
 * first when it is freed.
 */
#include "_guard.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum {
	/* More than the memory slots and DMA maps of one back-end, and its log and in-flight area. */
	SLOTS = 1 << 16,
	/* After so many single pages the whole mapping is replaced, so that the number of kernel
	 * mappings (vm.max_map_count) is not in a front-end's hands. */
	SINGLE_PAGES = 64,
};

struct slot {
	_Atomic uintptr_t start, end; /* end 0: free */
	uintptr_t page;               /* of the backing file: 4096, or that of hugetlbfs */
	_Atomic uint64_t faults;
};

static struct slot *slots; /* untouched pages of the table take no memory */
static _Atomic size_t used; /* slots below this may be filled */
static _Atomic uint64_t faults;
static struct sigaction before;

static int zeroes(uintptr_t start, uintptr_t length)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;

	return mmap((void *)start, length, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED;
}

/* Replace what *at* lies in.  Return 0 when the access can be repeated. */
static int mend(uintptr_t at)
{
	size_t n = atomic_load(&used);

	for (size_t i = 0; i < n; i++) {
		struct slot *s = &slots[i];
		uintptr_t end = atomic_load(&s->end), start = atomic_load(&s->start);

		if (at < start || at >= end)
			continue;
		uint64_t seen = atomic_fetch_add(&s->faults, 1);

		atomic_fetch_add(&faults, 1);
		if (seen < SINGLE_PAGES)
			return zeroes(at & ~(s->page - 1), s->page);
		return zeroes(start, end - start);
	}
	return 1;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	int saved = errno;

	(void)context;
	if (info->si_code <= 0 || mend((uintptr_t)info->si_addr)) {
		/* Not an access to a guarded mapping: the next one ends the process as before. */
		sigaction(number, &before, NULL);
		if (info->si_code <= 0)
			raise(number);
	}
	errno = saved;
}

/* install() -> None: take over SIGBUS; OSError where that is not possible. */
static PyObject *guard_install(PyObject *module, PyObject *unused)
{
	struct sigaction action;

	(void)module;
	(void)unused;
	if (slots)
		Py_RETURN_NONE;
	void *table = mmap(NULL, SLOTS * sizeof(*slots), PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (table == MAP_FAILED)
		return PyErr_SetFromErrno(PyExc_OSError);
	slots = table;
	memset(&action, 0, sizeof(action));
	action.sa_sigaction = on_sigbus;
	action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
	sigemptyset(&action.sa_mask);
	if (sigaction(SIGBUS, &action, &before) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

/* add(start, length, page) -> slot: guard a mapping; its page size is a power of two. */
static PyObject *guard_add(PyObject *module, PyObject *args)
{
	unsigned long long start, length, page;

	(void)module;
	if (!PyArg_ParseTuple(args, "KKK", &start, &length, &page))
		return NULL;
	if (!slots || !page || (page & (page - 1)) || start % page || length % page || !length ||
	    start + length < start) {
		PyErr_SetString(PyExc_ValueError, "not a whole number of pages, or not installed");
		return NULL;
	}
	for (size_t i = 0; i < SLOTS; i++) {
		struct slot *s = &slots[i];

		if (atomic_load(&s->end))
			continue;
		s->page = page;
		atomic_store(&s->faults, 0);
		atomic_store(&s->start, start);
		atomic_store(&s->end, start + length);
		if (i >= atomic_load(&used))
			atomic_store(&used, i + 1);
		return PyLong_FromSize_t(i);
	}
	PyErr_SetString(PyExc_OverflowError, "too many guarded mappings");
	return NULL;
}

static struct slot *filled(PyObject *arg)
{
	size_t i = PyLong_AsSize_t(arg);

	if (PyErr_Occurred())
		return NULL;
	if (slots && i < SLOTS && atomic_load(&slots[i].end))
		return &slots[i];
	PyErr_SetString(PyExc_ValueError, "no such slot");
	return NULL;
}

/* remove(slot) -> None: the mapping is about to go, or has gone. */
static PyObject *guard_remove(PyObject *module, PyObject *arg)
{
	struct slot *s = filled(arg);

	(void)module;
	if (!s)
		return NULL;
	atomic_store(&s->end, 0);
	Py_RETURN_NONE;
}

/* faults(slot=None) -> int: accesses that failed, in one mapping or in all since the start. */
static PyObject *guard_faults(PyObject *module, PyObject *arg)
{
	(void)module;
	if (arg == Py_None)
		return PyLong_FromUnsignedLongLong(atomic_load(&faults));
	struct slot *s = filled(arg);

	return s ? PyLong_FromUnsignedLongLong(atomic_load(&s->faults)) : NULL;
}

static PyMethodDef methods[] = {
	{ "install", guard_install, METH_NOARGS, "See native/guard.py." },
	{ "add", guard_add, METH_VARARGS, "See native/guard.py." },
	{ "remove", guard_remove, METH_O, "See native/guard.py." },
	{ "faults", guard_faults, METH_O, "See native/guard.py." },
	{ "signal", (PyCFunction)(void (*)(void))native_signal, METH_FASTCALL, "See native/guard.py." },
	{ "report_sigsys", (PyCFunction)(void (*)(void))native_report_sigsys, METH_FASTCALL,
	  "See native/guard.py." },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT, "_guard", "SIGBUS, SIGSYS and eventfds; see vballoon.native.guard.", -1, methods,
	NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__guard(void)
{
	return PyModule_Create(&definition);
}
