// SPDX-License-Identifier: Apache-2.0
/*
 * The inner loops that NumPy takes several passes for, one pass each.  Optional: everything here
 * has a form in NumPy that means the same, is tested beside it, and is used where this was not
 * built (docs/benchmarks.md shows what it is for).
 *
 * A guest may be writing to the memory that is read here.  So every field is copied once, and only
 * the copy is checked and used; and nothing here decides that a chain is wrong: a chain that is not
 * in order beyond doubt is left alone, and the scalar engine has the word.
 *
 * Written for the limited API of CPython 3.11, so that one build serves all later versions.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define FASTEST __attribute__((target_clones("arch=icelake-server", "popcnt", "default"), optimize("O3")))
#else
#define FASTEST
#endif

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 0x80, USED = 0x8000 };
enum { BUFFERS_MAX = 12, RECORD = 16 };
static const uint64_t CHAIN_BYTES_MAX = 1ULL << 32;

/* ---- arguments ---- */

struct args {
	Py_buffer views[BUFFERS_MAX];
	int count;
};

static void release(struct args *a)
{
	while (a->count)
		PyBuffer_Release(&a->views[--a->count]);
}

/* The memory of *object*, contiguous, a whole number of *item* bytes; *n gets how many. */
static void *take(struct args *a, PyObject *object, Py_ssize_t item, bool write, Py_ssize_t *n)
{
	Py_buffer *view = &a->views[a->count];

	if (PyObject_GetBuffer(object, view, write ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0)
		return NULL;
	a->count++;
	if (view->len % item) {
		PyErr_SetString(PyExc_ValueError, "a buffer of an odd size");
		return NULL;
	}
	if (n)
		*n = view->len / item;
	/* an empty view may have no address, and is never looked into */
	return view->buf ? view->buf : (void *)a;
}

static PyObject *failed(struct args *a, const char *why)
{
	release(a);
	if (!PyErr_Occurred())
		PyErr_SetString(PyExc_ValueError, why);
	return NULL;
}

/* ---- bits ---- */

static inline __attribute__((always_inline)) void fill_range(uint64_t *words, uint64_t first, uint64_t last, bool value)
{
	uint64_t a = first >> 6, b = last >> 6;
	uint64_t head = ~0ULL << (first & 63), tail = (1ULL << (last & 63)) - 1;

	if (a == b) {
		head &= tail;
		words[a] = value ? words[a] | head : words[a] & ~head;
		return;
	}
	if (first & 63) {
		words[a] = value ? words[a] | head : words[a] & ~head;
		a++;
	}
	if (value && b - a == 16)
		memset(&words[a], 0xff, 128); /* 4 MiB, what hints and reports are made of */
	else
		memset(&words[a], value ? 0xff : 0, (b - a) * 8);
	if (last & 63)
		words[b] = value ? words[b] | tail : words[b] & ~tail;
}

enum kind { PAGES, COUNTED, BYTES };
static const uint64_t PAGE_NUMBERS = 1ULL << 51; /* more than any address has, and sums fit */

struct column {
	const uint8_t *a, *b;
	Py_ssize_t stride_a, stride_b, n;
	int kind;
	uint64_t least;
	const uint64_t *table; /* first page, end page, what to add for the bit */
	Py_ssize_t rows;
	uint64_t low, high, add; /* the row that was right last time */
};

/* Whether [first, last) is in one row, which is then in low, high, add. */
static inline bool in_a_row(struct column *c, uint64_t first, uint64_t last)
{
	if (first >= c->low && last <= c->high)
		return true;
	for (Py_ssize_t i = 0; i < c->rows; i++)
		if (first >= c->table[3 * i] && last <= c->table[3 * i + 1]) {
			c->low = c->table[3 * i];
			c->high = c->table[3 * i + 1];
			c->add = c->table[3 * i + 2];
			return true;
		}
	return false;
}

static uint64_t pages_inside(const struct column *c, uint64_t first, uint64_t last)
{
	uint64_t inside = 0;

	for (Py_ssize_t i = 0; i < c->rows; i++) {
		uint64_t low = first > c->table[3 * i] ? first : c->table[3 * i];
		uint64_t high = last < c->table[3 * i + 1] ? last : c->table[3 * i + 1];

		inside += low < high ? high - low : 0;
	}
	return inside;
}

/*
 * Item *i* as pages, half open (first > last never).  Bytes: *odd counts those that do not begin
 * and end on a page.  Counted: *odd counts those that are too small or not wholly guest memory,
 * and they become empty.  Pages: *odd counts those that end before they begin.
 */
static inline void pages_of(struct column *c, Py_ssize_t i, uint64_t *first, uint64_t *last,
			    uint64_t *odd)
{
	uint64_t a, b = 0;
	uint32_t len;

	memcpy(&a, c->a + i * c->stride_a, 8);
	if (c->kind == BYTES) {
		memcpy(&len, c->b + i * c->stride_b, 4);
		b = a + len;
		*odd += !!((a | b) & 4095);
		*first = (a + 4095) >> 12;
		*last = b >> 12;
	} else {
		memcpy(&b, c->b + i * c->stride_b, 8);
		*first = a;
		*last = b;
		if (c->kind == COUNTED) {
			*last = a + b;
			if (b < c->least || b >= PAGE_NUMBERS || a >= PAGE_NUMBERS ||
			    (!in_a_row(c, a, a + b) && pages_inside(c, a, a + b) != b)) {
				++*odd;
				*last = a;
			}
		}
	}
	if (*last < *first) {
		*odd += c->kind == PAGES;
		*last = *first;
	}
}

/* The part of [first, last) in each row; whether that was all of it. */
static bool clip_and_fill(uint64_t *words, const struct column *c, uint64_t first, uint64_t last,
			  bool value)
{
	const uint64_t *row = c->table;

	for (Py_ssize_t i = 0; i < c->rows; i++, row += 3) {
		uint64_t low = first > row[0] ? first : row[0];
		uint64_t high = last < row[1] ? last : row[1];

		if (low < high)
			fill_range(words, low + row[2], high + row[2], value);
	}
	return pages_inside(c, first, last) == last - first;
}

/*
 * mark(words, table, a, b, strides, n, kind, value, least) -> (pages, odd, clipped) or None
 *
 * Fill the bits of n ranges of pages.  None, and only some are done, where the ranges together are
 * larger than the bitmap: they overlap, and are to be merged first, so that the work is bounded.
 */
static PyObject *mark(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct args a = { .count = 0 };
	struct column c = { .high = 0 };
	Py_ssize_t nwords, size_a, size_b;
	uint64_t total = 0, odd = 0, clipped = 0, first, last;

	(void)module;
	if (nargs != 9)
		return failed(&a, "mark takes 9 arguments");
	uint64_t *words = take(&a, args[0], 8, true, &nwords);
	if (!words)
		return failed(&a, "");
	const uint64_t *row = take(&a, args[1], 24, false, &c.rows);
	if (!row)
		return failed(&a, "");
	c.table = row;
	if (!(c.a = take(&a, args[2], 1, false, &size_a)) || !(c.b = take(&a, args[3], 1, false, &size_b)))
		return failed(&a, "");
	if (!PyArg_ParseTuple(args[4], "nn", &c.stride_a, &c.stride_b))
		return failed(&a, "");
	c.n = PyLong_AsSsize_t(args[5]);
	c.kind = (int)PyLong_AsLong(args[6]);
	bool value = PyObject_IsTrue(args[7]) > 0;
	c.least = PyLong_AsUnsignedLongLong(args[8]);
	Py_ssize_t item_b = c.kind == BYTES ? 4 : 8;
	if (PyErr_Occurred() || c.n < 0 || c.stride_a < 8 || c.stride_b < item_b ||
	    (c.n && ((c.n - 1) > (size_a - 8) / c.stride_a || size_a < 8 || size_b < item_b ||
		     (c.n - 1) > (size_b - item_b) / c.stride_b)))
		return failed(&a, "columns that are too short");
	for (Py_ssize_t i = 0; i < c.rows; i++, row += 3)
		if (row[1] < row[0] || row[1] + row[2] > (uint64_t)nwords * 64 ||
		    row[0] + row[2] > row[1] + row[2])
			return failed(&a, "a table that does not fit the bitmap");
	for (Py_ssize_t i = 0; i < c.n; i++) {
		pages_of(&c, i, &first, &last, &odd);
		if (first == last)
			continue;
		if (last - first > (uint64_t)nwords * 64 - total) {
			release(&a);
			Py_RETURN_NONE;
		}
		total += last - first;
		if (in_a_row(&c, first, last))
			fill_range(words, first + c.add, last + c.add, value);
		else
			clipped += !clip_and_fill(words, &c, first, last, value);
	}
	if (c.kind == PAGES)
		clipped += odd;
	release(&a);
	return Py_BuildValue("KKK", (unsigned long long)total, (unsigned long long)odd,
			     (unsigned long long)clipped);
}

FASTEST static uint64_t ones(const uint64_t *words, size_t n)
{
	uint64_t total = 0;

	for (size_t i = 0; i < n; i++)
		total += (uint64_t)__builtin_popcountll(words[i]);
	return total;
}

/* count(words) -> bits that are set */
static PyObject *count(PyObject *module, PyObject *object)
{
	struct args a = { .count = 0 };
	Py_ssize_t n;
	const uint64_t *words = take(&a, object, 8, false, &n);
	uint64_t found;

	(void)module;
	if (!words)
		return failed(&a, "");
	Py_BEGIN_ALLOW_THREADS
	found = ones(words, (size_t)n);
	Py_END_ALLOW_THREADS
	release(&a);
	return PyLong_FromUnsignedLongLong(found);
}

/* ---- page ranges ---- */

/*
 * merge(start, end, out_start, out_end) -> ranges, or -1 where the starts do not ascend
 *
 * Ranges that touch or overlap become one; empty ones vanish.
 */
static PyObject *merge(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct args a = { .count = 0 };
	Py_ssize_t n[4];
	uint64_t *column[4];
	Py_ssize_t found = 0;

	(void)module;
	if (nargs != 4)
		return failed(&a, "merge takes 4 arguments");
	for (int i = 0; i < 4; i++)
		if (!(column[i] = take(&a, args[i], 8, i > 1, &n[i])))
			return failed(&a, "");
	if (n[0] != n[1] || n[2] < n[0] || n[3] < n[0])
		return failed(&a, "columns of different sizes");
	uint64_t *start = column[2], *end = column[3], low = 0;
	for (Py_ssize_t i = 0; i < n[0]; i++) {
		uint64_t s = column[0][i], e = column[1][i];

		if (s >= e)
			continue;
		if (s < low) {
			found = -1;
			break;
		}
		low = s;
		if (found && s <= end[found - 1]) {
			if (e > end[found - 1])
				end[found - 1] = e;
		} else {
			start[found] = s;
			end[found++] = e;
		}
	}
	release(&a);
	return PyLong_FromSsize_t(found);
}

/* Bytes at guest-physical *addr*: regions are rows of (address, size, where it is mapped). */
static const uint8_t *mapped(const uint64_t *regions, Py_ssize_t rows, uint64_t addr, uint64_t len)
{
	for (Py_ssize_t i = 0; i < rows; i++, regions += 3) {
		uint64_t offset = addr - regions[0];

		if (offset <= regions[1] && len <= regions[1] - offset)
			return regions[2] ? (const uint8_t *)(uintptr_t)regions[2] + offset : NULL;
	}
	return NULL;
}

struct runs {
	uint64_t *start, *end;
	Py_ssize_t found, room;
};

/* The run that is being built is [low, high); a new one begins at *page*. */
static inline bool begin_run(struct runs *r, uint64_t *low, uint64_t *high, uint64_t page)
{
	if (*low < *high) {
		if (r->found == r->room)
			return false;
		r->start[r->found] = *low;
		r->end[r->found++] = *high;
	}
	*low = page;
	*high = page + 1;
	return true;
}

/*
 * page_runs(regions, spans, addr, words, out_start, out_end) -> (runs, bad) or None
 *
 * The le32 page numbers at each guest-physical address, *words* (int64) of them, each read once:
 * neighbours that follow each other up or down become one range.  *spans* are rows of (address,
 * size) of guest memory, in bytes; pages outside are counted as bad.  None where an address is not
 * mapped, or the runs are more than there is room for.
 */
static PyObject *page_runs(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct args a = { .count = 0 };
	Py_ssize_t regions_n, spans_n, n, m, room_a, room_b;
	uint64_t bad = 0, low = 1, high = 0, run_low = 0, run_high = 0;

	(void)module;
	if (nargs != 6)
		return failed(&a, "page_runs takes 6 arguments");
	const uint64_t *regions = take(&a, args[0], 24, false, &regions_n);
	if (!regions)
		return failed(&a, "");
	const uint64_t *spans = take(&a, args[1], 16, false, &spans_n);
	if (!spans)
		return failed(&a, "");
	const uint64_t *addr = take(&a, args[2], 8, false, &n);
	if (!addr)
		return failed(&a, "");
	const int64_t *words = take(&a, args[3], 8, false, &m);
	if (!words)
		return failed(&a, "");
	struct runs r = { .found = 0 };
	if (!(r.start = take(&a, args[4], 8, true, &room_a)) ||
	    !(r.end = take(&a, args[5], 8, true, &room_b)))
		return failed(&a, "");
	if (n != m)
		return failed(&a, "columns of different sizes");
	r.room = room_a < room_b ? room_a : room_b;
	for (Py_ssize_t i = 0; i < n; i++) {
		const uint8_t *at;

		if (words[i] <= 0)
			continue;
		at = words[i] > (1 << 30) ? NULL : mapped(regions, regions_n, addr[i], 4 * (uint64_t)words[i]);
		if (!at) {
			release(&a);
			Py_RETURN_NONE;
		}
		for (int64_t k = 0; k < words[i]; k++) {
			uint32_t number;

			memcpy(&number, at + 4 * k, 4);
			__asm__ volatile("" ::: "memory"); /* not to be loaded a second time */
			uint64_t page = number;
			if (page == run_high && page < high && run_low < run_high) {
				run_high++;
				continue;
			}
			if (page < low || page >= high) {
				Py_ssize_t row = 0;

				for (; row < spans_n; row++) {
					low = (spans[2 * row] + 4095) >> 12;
					high = (spans[2 * row] + spans[2 * row + 1]) >> 12;
					if (page >= low && page < high)
						break;
				}
				if (row == spans_n) {
					low = 1;
					high = 0;
					bad++;
					continue;
				}
			}
			if (page + 1 == run_low && run_low < run_high)
				run_low--;
			else if ((page < run_low || page >= run_high) &&
				 !begin_run(&r, &run_low, &run_high, page))
				goto no_room;
		}
	}
	if (!begin_run(&r, &run_low, &run_high, 0))
		goto no_room;
	release(&a);
	return Py_BuildValue("nK", r.found, (unsigned long long)bad);
no_room:
	release(&a);
	Py_RETURN_NONE;
}

/*
 * punch(fd, start, end) -> (ranges done, errno)
 *
 * Free the byte ranges of a file, one after the other, until one cannot be.
 */
static PyObject *punch(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct args a = { .count = 0 };
	Py_ssize_t n, m, i;
	int error = 0;

	(void)module;
	if (nargs != 3)
		return failed(&a, "punch takes 3 arguments");
	int fd = (int)PyLong_AsLong(args[0]);
	const uint64_t *start = take(&a, args[1], 8, false, &n);
	if (!start)
		return failed(&a, "");
	const uint64_t *end = take(&a, args[2], 8, false, &m);
	if (!end || n != m || PyErr_Occurred())
		return failed(&a, "columns of different sizes");
	Py_BEGIN_ALLOW_THREADS
	for (i = 0; i < n && !error; i++) {
		do {
			error = fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
					  (off_t)start[i], (off_t)(end[i] - start[i])) ? errno : 0;
		} while (error == EINTR);
	}
	Py_END_ALLOW_THREADS
	release(&a);
	return Py_BuildValue("ni", error ? i - 1 : i, error);
}

/* ---- taking buffers ---- */

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t a, b; /* split: flags, next; packed: id, flags */
};

struct taking {
	const uint8_t *table;     /* of the ring */
	uint32_t size;
	bool packed, indirect;
	const uint64_t *regions, *spans;
	Py_ssize_t regions_n, spans_n;
	uint16_t *slots;          /* by head or id: what an outstanding buffer has of the ring */
	Py_ssize_t slots_n;
	uint32_t held;            /* their sum */
	/* columns of the batch */
	uint16_t *ids, *taken;
	int64_t *first;
	uint64_t *addr;
	uint32_t *len;
	uint8_t *writable;
	Py_ssize_t room, used;    /* elements */
	/* of the chain that is being followed */
	uint64_t total;
	uint32_t elements;
	bool write_seen;
	uint64_t low, size_of_low; /* the span that was right last time */
};

static inline struct desc load_desc(const uint8_t *at)
{
	struct desc d;

	memcpy(&d, at, sizeof(d));
	__asm__ volatile("" ::: "memory"); /* not to be loaded a second time */
	return d;
}

static inline bool holds(struct taking *t, uint64_t addr, uint64_t len)
{
	uint64_t offset = addr - t->low;

	if (offset <= t->size_of_low && len <= t->size_of_low - offset)
		return true;
	for (Py_ssize_t i = 0; i < t->spans_n; i++) {
		offset = addr - t->spans[2 * i];
		if (offset <= t->spans[2 * i + 1] && len <= t->spans[2 * i + 1] - offset) {
			t->low = t->spans[2 * i];
			t->size_of_low = t->spans[2 * i + 1];
			return true;
		}
	}
	return false;
}

static inline bool add_element(struct taking *t, const struct desc *d, uint16_t flags)
{
	bool write = flags & WRITE;

	if (t->used == t->room || t->elements == t->size || (t->write_seen && !write) ||
	    !holds(t, d->addr, d->len))
		return false;
	t->total += d->len;
	if (t->total > CHAIN_BYTES_MAX)
		return false;
	t->addr[t->used] = d->addr;
	t->len[t->used] = d->len;
	t->writable[t->used++] = write;
	t->write_seen |= write;
	t->elements++;
	return true;
}

/* An indirect table: split tables may be in any order, packed ones are in their own. */
static bool follow_table(struct taking *t, const struct desc *d)
{
	uint32_t count = d->len / RECORD, at = 0;
	const uint8_t *table;

	if (!t->indirect || !d->len || d->len % RECORD || count > t->size)
		return false;
	table = mapped(t->regions, t->regions_n, d->addr, d->len);
	if (!table)
		return false;
	for (uint32_t visited = 0; visited < count; visited++) {
		struct desc e = load_desc(table + (size_t)RECORD * at);
		uint16_t flags = t->packed ? e.b : e.a;

		if ((!t->packed && flags & INDIRECT) || !add_element(t, &e, flags))
			return false;
		if (t->packed) {
			at++;
			continue;
		}
		if (!(flags & NEXT))
			return true;
		at = e.b;
		if (at >= count)
			return false;
	}
	return t->packed;
}

static void begin_chain(struct taking *t)
{
	t->total = 0;
	t->elements = 0;
	t->write_seen = false;
}

/* The chain at *head*; how many of the ring's descriptors it has, 0 where it is not in order. */
static uint32_t follow_split(struct taking *t, uint16_t head)
{
	uint32_t at = head, slots = 0;

	begin_chain(t);
	for (;;) {
		struct desc d = load_desc(t->table + (size_t)RECORD * at);

		slots++;
		if (d.a & INDIRECT)
			return !(d.a & NEXT) && follow_table(t, &d) ? slots : 0;
		if (!add_element(t, &d, d.a))
			return 0;
		if (!(d.a & NEXT))
			return slots;
		at = d.b;
		if (at >= t->size || slots == t->size)
			return 0;
	}
}

static bool keep_chain(struct taking *t, Py_ssize_t i, uint16_t id, uint32_t slots)
{
	if (id >= t->slots_n || t->slots[id] || t->held + slots > t->size)
		return false;
	t->slots[id] = (uint16_t)slots;
	t->held += slots;
	t->ids[i] = id;
	t->taken[i] = (uint16_t)slots;
	t->first[i + 1] = t->used;
	return true;
}

static Py_ssize_t take_split(struct taking *t, const uint16_t *ring, uint32_t from, Py_ssize_t limit)
{
	Py_ssize_t i;

	for (i = 0; i < limit; i++) {
		uint16_t head = *(const volatile uint16_t *)&ring[(from + i) & (t->size - 1)];
		Py_ssize_t before = t->used;

		if (head >= t->size || t->slots[head]) {
			break;
		}
		uint32_t slots = follow_split(t, head);
		if (!slots || !keep_chain(t, i, head, slots)) {
			t->used = before;
			break;
		}
	}
	return i;
}

static inline bool is_available(uint16_t flags, bool wrap)
{
	return (flags & (AVAIL | USED)) == (wrap ? AVAIL : USED);
}

/* The list at *slot*; its slots and id, 0 where it is not in order or not available. */
static uint32_t follow_packed(struct taking *t, uint32_t slot, bool wrap, uint16_t *id)
{
	uint32_t slots = 0;

	begin_chain(t);
	for (;;) {
		const uint8_t *at = t->table + (size_t)RECORD * slot;
		uint16_t flags = *(const volatile uint16_t *)(at + 14);

		if (!is_available(flags, wrap))
			return 0;
		atomic_thread_fence(memory_order_acquire);
		struct desc d = load_desc(at);
		d.b = flags;
		slots++;
		*id = d.a;
		if (flags & INDIRECT)
			return slots == 1 && !(flags & NEXT) && follow_table(t, &d) ? 1 : 0;
		if (!add_element(t, &d, flags))
			return 0;
		if (!(flags & NEXT))
			return slots;
		if (slots == t->size)
			return 0;
		if (++slot == t->size) {
			slot = 0;
			wrap = !wrap;
		}
	}
}

static Py_ssize_t take_packed(struct taking *t, uint32_t slot, bool wrap, Py_ssize_t limit)
{
	Py_ssize_t i;

	for (i = 0; i < limit; i++) {
		Py_ssize_t before = t->used;
		uint16_t id;
		uint32_t slots = follow_packed(t, slot, wrap, &id);

		if (!slots || !keep_chain(t, i, id, slots)) {
			t->used = before;
			break;
		}
		slot += slots;
		if (slot >= t->size) {
			slot -= t->size;
			wrap = !wrap;
		}
	}
	return i;
}

/*
 * take_run(memory, desc, ring, where, slots, out, limit, held) -> (buffers, elements, slots)
 *
 * The leading buffers that are in order beyond doubt, booked in *slots*.  memory = (regions,
 * spans), as above; desc: the descriptor area; ring: the heads of a split ring, None for a packed
 * one; where = (from, wrap, indirect); out = (ids, taken, first, addr, len, writable).
 */
static PyObject *take_run(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct args a = { .count = 0 };
	struct taking t = { .size_of_low = 0 };
	Py_ssize_t heads = 0, desc_n, ids_n, taken_n, first_n, addr_n, len_n, writable_n, done;
	const uint16_t *ring = NULL;
	PyObject *regions, *spans, *out[6];
	int from, wrap, indirect;

	(void)module;
	if (nargs != 8 || !PyArg_ParseTuple(args[0], "OO", &regions, &spans) ||
	    !PyArg_ParseTuple(args[3], "iii", &from, &wrap, &indirect) ||
	    !PyArg_ParseTuple(args[5], "OOOOOO", &out[0], &out[1], &out[2], &out[3], &out[4], &out[5]))
		return failed(&a, "take_run takes 8 arguments");
	t.packed = args[2] == Py_None;
	t.indirect = indirect;
	if (!(t.regions = take(&a, regions, 24, false, &t.regions_n)) ||
	    !(t.spans = take(&a, spans, 16, false, &t.spans_n)) ||
	    !(t.table = take(&a, args[1], RECORD, false, &desc_n)) ||
	    !(t.slots = take(&a, args[4], 2, true, &t.slots_n)) ||
	    !(t.ids = take(&a, out[0], 2, true, &ids_n)) ||
	    !(t.taken = take(&a, out[1], 2, true, &taken_n)) ||
	    !(t.first = take(&a, out[2], 8, true, &first_n)) ||
	    !(t.addr = take(&a, out[3], 8, true, &addr_n)) ||
	    !(t.len = take(&a, out[4], 4, true, &len_n)) ||
	    !(t.writable = take(&a, out[5], 1, true, &writable_n)) ||
	    (!t.packed && !(ring = take(&a, args[2], 2, false, &heads))))
		return failed(&a, "");
	Py_ssize_t limit = PyLong_AsSsize_t(args[6]);
	t.held = (uint32_t)PyLong_AsUnsignedLong(args[7]);
	t.size = (uint32_t)desc_n;
	t.room = addr_n < len_n ? addr_n : len_n;
	t.room = t.room < writable_n ? t.room : writable_n;
	if (PyErr_Occurred() || limit < 0 || limit > ids_n || limit > taken_n || limit >= first_n ||
	    desc_n < 1 || desc_n > 32768 || from < 0 || t.held > t.size || t.slots_n < desc_n ||
	    (!t.packed && (heads != desc_n || (desc_n & (desc_n - 1)))) || (t.packed && from >= desc_n))
		return failed(&a, "columns that do not fit the ring");
	t.first[0] = 0;
	done = t.packed ? take_packed(&t, (uint32_t)from, wrap, limit) :
			  take_split(&t, ring, (uint32_t)from, limit);
	release(&a);
	return Py_BuildValue("nnI", done, t.used, (unsigned int)t.held);
}

/* ---- giving buffers ---- */

/*
 * book_given(slots, ids, out) -> slots that become free, or -1
 *
 * The buffers *ids* are not outstanding any more; *out* (uint16) gets what each occupied.  -1, and
 * nothing is changed, where one of them is not outstanding, or is there twice.
 */
static PyObject *book_given(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct args a = { .count = 0 };
	Py_ssize_t slots_n, n, room, i, total = 0;

	(void)module;
	if (nargs != 3)
		return failed(&a, "book_given takes 3 arguments");
	uint16_t *slots = take(&a, args[0], 2, true, &slots_n);
	if (!slots)
		return failed(&a, "");
	const uint16_t *ids = take(&a, args[1], 2, false, &n);
	if (!ids)
		return failed(&a, "");
	uint16_t *out = take(&a, args[2], 2, true, &room);
	if (!out)
		return failed(&a, "");
	if (room < n)
		return failed(&a, "columns of different sizes");
	for (i = 0; i < n && ids[i] < slots_n && slots[ids[i]]; i++) {
		total += out[i] = slots[ids[i]];
		slots[ids[i]] = 0;
	}
	if (i < n) {
		while (i--)
			slots[ids[i]] = out[i];
		total = -1;
	}
	release(&a);
	return PyLong_FromSsize_t(total);
}

/* used_split(elements, from, ids, written): the used elements of a split ring, no index. */
static PyObject *used_split(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct args a = { .count = 0 };
	Py_ssize_t size, n, m;

	(void)module;
	if (nargs != 4)
		return failed(&a, "used_split takes 4 arguments");
	uint32_t(*elements)[2] = take(&a, args[0], 8, true, &size);
	if (!elements)
		return failed(&a, "");
	const uint16_t *ids = take(&a, args[2], 2, false, &n);
	if (!ids)
		return failed(&a, "");
	const uint32_t *written = take(&a, args[3], 4, false, &m);
	if (!written)
		return failed(&a, "");
	Py_ssize_t at = PyLong_AsSsize_t(args[1]);
	if (PyErr_Occurred() || n != m || n > size || at < 0 || at >= size)
		return failed(&a, "columns that do not fit the ring");
	for (Py_ssize_t i = 0; i < n; i++) {
		elements[at][0] = ids[i];
		elements[at][1] = written[i];
		if (++at == size)
			at = 0;
	}
	release(&a);
	Py_RETURN_NONE;
}

/*
 * used_packed(desc, from, wrap, ids, written, slots) -> flags of the first one
 *
 * The used descriptors of a packed ring, all but the first one's flags, which publish the rest.
 */
static PyObject *used_packed(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct args a = { .count = 0 };
	Py_ssize_t size, n, m, k;
	uint16_t first = 0;

	(void)module;
	if (nargs != 6)
		return failed(&a, "used_packed takes 6 arguments");
	uint8_t *table = take(&a, args[0], RECORD, true, &size);
	if (!table)
		return failed(&a, "");
	const uint16_t *ids = take(&a, args[3], 2, false, &n);
	if (!ids)
		return failed(&a, "");
	const uint32_t *written = take(&a, args[4], 4, false, &m);
	if (!written)
		return failed(&a, "");
	const uint16_t *slots = take(&a, args[5], 2, false, &k);
	if (!slots)
		return failed(&a, "");
	Py_ssize_t at = PyLong_AsSsize_t(args[1]);
	bool wrap = PyObject_IsTrue(args[2]) > 0;
	if (PyErr_Occurred() || n != m || n > k || at < 0 || at >= size)
		return failed(&a, "columns that do not fit the ring");
	for (Py_ssize_t i = 0; i < n; i++) {
		uint16_t flags = (wrap ? AVAIL | USED : 0) | (written[i] ? WRITE : 0);
		uint8_t *d = table + RECORD * at;

		memcpy(d + 8, &written[i], 4);
		memcpy(d + 12, &ids[i], 2);
		if (i)
			memcpy(d + 14, &flags, 2);
		else
			first = flags;
		at += slots[i];
		if (at >= size) {
			at -= size;
			wrap = !wrap;
		}
		if (at >= size)
			return failed(&a, "a buffer larger than the ring");
	}
	release(&a);
	return PyLong_FromLong(first);
}

static PyMethodDef methods[] = {
	{ "mark", (PyCFunction)(void (*)(void))mark, METH_FASTCALL, "See memory/native.py." },
	{ "count", count, METH_O, "See memory/native.py." },
	{ "merge", (PyCFunction)(void (*)(void))merge, METH_FASTCALL, "See memory/native.py." },
	{ "page_runs", (PyCFunction)(void (*)(void))page_runs, METH_FASTCALL, "See memory/native.py." },
	{ "punch", (PyCFunction)(void (*)(void))punch, METH_FASTCALL, "See memory/native.py." },
	{ "take_run", (PyCFunction)(void (*)(void))take_run, METH_FASTCALL, "See memory/native.py." },
	{ "book_given", (PyCFunction)(void (*)(void))book_given, METH_FASTCALL, "See memory/native.py." },
	{ "used_split", (PyCFunction)(void (*)(void))used_split, METH_FASTCALL, "See memory/native.py." },
	{ "used_packed", (PyCFunction)(void (*)(void))used_packed, METH_FASTCALL, "See memory/native.py." },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT, "_native", "Inner loops; see vballoon.memory.native.", -1, methods,
	NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
	return PyModule_Create(&definition);
}
