// SPDX-License-Identifier: Apache-2.0
/*
 * What the files of the compiled loops share: the arrays that Python hands over, and guest memory.
 *
 * A guest may be writing to the memory that is read here.  So every field is loaded once, and only
 * what was loaded is checked and used; and nothing here decides that a chain is wrong: what is not
 * certainly valid is left alone, and the scalar engine decides.
 *
 * Whatever is looked into is held by a buffer export of its own for as long as the call lasts, and
 * no address is kept from one call to the next: a region that is closed meanwhile stays mapped
 * until the call is over, and is not there for the one after it.
 *
 * Written for the limited API of CPython 3.11, so that one build serves all later versions.
 */
#ifndef VBALLOON_NATIVE_H
#define VBALLOON_NATIVE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "guest memory is little-endian, and is read as it is"
#endif
#if SIZE_MAX < UINT64_MAX
#error "indices are taken to have 64 bits"
#endif

#pragma GCC visibility push(hidden)

/* *value* was loaded from memory that may change: it is not to be loaded a second time. */
#define FETCHED(value) __asm__ volatile("" : "+r"(value))

/* ---- arrays ---- */

enum { ARRAYS_MAX = 12 };

struct args {
	Py_buffer views[ARRAYS_MAX];
	int count;
};

struct array {
	void *data;
	Py_ssize_t n; /* items */
};

/*
 * The memory of *objects*, contiguous, into *out*.  *spec* has a letter for each: b, h, i, q, p or t
 * for items of 1, 2, 4, 8, 16 or 24 bytes, a capital one where it is written to.
 */
bool take_arrays(struct args *a, PyObject *const *objects, const char *spec, struct array *out);
void release(struct args *a);
/* Releases everything; NULL, with *why* as ValueError unless there is an error already. */
PyObject *failed(struct args *a, const char *why);

/* ---- guest memory ---- */

struct guest {
	const uint64_t *extents; /* of each region: first address, bytes */
	const uint64_t *spans;   /* the same of each run of regions without a gap */
	Py_ssize_t regions, runs;
	PyObject *views;         /* of each region: its mapping, or None */
	Py_buffer *held;         /* exports of those that were looked into */
	uint64_t low, size;      /* the region that was right last time */
	const uint8_t *base;
};

/* *memory* is GuestMemory.tables: (extents, spans, views).  Close it also where this fails. */
bool open_guest(struct guest *g, struct args *a, PyObject *memory);
void close_guest(struct guest *g);
/* *len* bytes at guest-physical *addr*, all in one region that is mapped; NULL where they are not. */
const uint8_t *guest_bytes(struct guest *g, uint64_t addr, uint64_t len);

/* ---- page ranges ---- */

/* Sorts n ranges, none of them empty, and merges those that touch; how many are left, -1: no memory. */
Py_ssize_t merge_ranges(uint64_t *start, uint64_t *end, Py_ssize_t n);

/* ---- what Python calls; interface.py says what each does ---- */

#define CALLED(name) PyObject *name(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
CALLED(native_mark_pages);
CALLED(native_mark_bytes);
CALLED(native_mark_records);
CALLED(native_mark_guest_records);
CALLED(native_count);
CALLED(native_unite);
CALLED(native_merge);
CALLED(native_blocks);
CALLED(native_in_file);
CALLED(native_page_runs);
CALLED(native_punch);
CALLED(native_take_run);
CALLED(native_book_given);
CALLED(native_used_split);
CALLED(native_used_packed);

#pragma GCC visibility pop
#endif
