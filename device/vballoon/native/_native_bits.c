// SPDX-License-Identifier: Apache-2.0
/* Bits: filling those of page ranges, whatever the ranges are given as. */
#include "_native.h"

static const uint64_t PAGE_NUMBERS = 1ULL << 51; /* more than any address has, and sums fit */

/* A bitmap that is being filled. */
struct marking {
	uint64_t *words;
	const uint64_t *rows;    /* first page, end page, what to add for the number of the bit */
	Py_ssize_t n;
	uint64_t low, high, add; /* the row that was right last time */
	uint64_t left;           /* pages that may still come: so the work is bounded by the bitmap */
	uint64_t pages;
	uint64_t clipped;        /* ranges not wholly in a row */
	bool value;
};

static bool begin_marking(struct marking *m, const struct array *words, const struct array *table)
{
	const uint64_t *row = table->data;
	uint64_t bits = (uint64_t)words->n * 64;

	*m = (struct marking){ .words = words->data, .rows = row, .n = table->n, .left = bits,
			       .value = true };
	for (Py_ssize_t i = 0; i < m->n; i++, row += 3)
		if (row[1] < row[0] || row[1] + row[2] > bits || row[0] + row[2] > row[1] + row[2])
			return false;
	return true;
}

static inline void fill(uint64_t *words, uint64_t first, uint64_t last, bool value)
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

/* Whether [first, last) is in one row, which is then the one of last time. */
static inline bool in_a_row(struct marking *m, uint64_t first, uint64_t last)
{
	if (first >= m->low && last <= m->high)
		return true;
	for (const uint64_t *row = m->rows; row < m->rows + 3 * m->n; row += 3)
		if (first >= row[0] && last <= row[1]) {
			m->low = row[0];
			m->high = row[1];
			m->add = row[2];
			return true;
		}
	return false;
}

/* The parts of [first, last) that are in rows, filled with *fill_them*; their pages. */
static uint64_t in_rows(struct marking *m, uint64_t first, uint64_t last, bool fill_them)
{
	uint64_t inside = 0;

	for (const uint64_t *row = m->rows; row < m->rows + 3 * m->n; row += 3) {
		uint64_t low = first > row[0] ? first : row[0];
		uint64_t high = last < row[1] ? last : row[1];

		if (low >= high)
			continue;
		inside += high - low;
		if (fill_them)
			fill(m->words, low + row[2], high + row[2], m->value);
	}
	return inside;
}

/* Fills [first, last), first < last; false, and nothing is done, where that is too much in all. */
static inline bool mark(struct marking *m, uint64_t first, uint64_t last)
{
	if (last - first > m->left)
		return false;
	m->left -= last - first;
	m->pages += last - first;
	if (in_a_row(m, first, last))
		fill(m->words, first + m->add, last + m->add, m->value);
	else
		m->clipped += in_rows(m, first, last, true) != last - first;
	return true;
}

/*
 * What the loops look at for every range, in registers: a store to the bitmap could be one to a
 * struct in memory for all that the compiler knows.
 */
struct hot {
	uint64_t *words;
	uint64_t low, size, add, left;
};

static inline struct hot heat(const struct marking *m)
{
	return (struct hot){ m->words, m->low, m->high - m->low, m->add, m->left };
}

static inline void cool(struct marking *m, const struct hot *h)
{
	m->pages += m->left - h->left;
	m->left = h->left;
}

/* Fills a range that is in the row of last time; false, and nothing is done, where it is not. */
static inline __attribute__((always_inline)) bool mark_hot(struct hot *h, uint64_t first,
							   uint64_t pages, bool value)
{
	uint64_t offset = first - h->low;

	if (offset >= h->size || pages > h->size - offset || pages > h->left)
		return false;
	h->left -= pages;
	fill(h->words, first + h->add, first + pages + h->add, value);
	return true;
}

/* None: only some were filled, for the ranges together are larger than the bitmap. */
static PyObject *too_much(struct args *a)
{
	release(a);
	Py_RETURN_NONE;
}

/* mark_pages(words, table, start, end, value) -> clipped, or None */
CALLED(native_mark_pages)
{
	struct args a = { .count = 0 };
	struct array in[4];
	struct marking m;

	(void)module;
	if (nargs != 5 || !take_arrays(&a, args, "Qtqq", in))
		return failed(&a, "mark_pages takes 5 arguments");
	int value = PyObject_IsTrue(args[4]);
	const uint64_t *start = in[2].data, *end = in[3].data;
	if (value < 0 || in[2].n != in[3].n || !begin_marking(&m, &in[0], &in[1]))
		return failed(&a, "columns or a table that do not fit");
	m.value = value;
	struct hot h = heat(&m);
	for (Py_ssize_t i = 0; i < in[2].n; i++) {
		uint64_t first = start[i], last = end[i];

		if (first >= last) {
			m.clipped += first > last;
		} else if (!mark_hot(&h, first, last - first, value)) {
			cool(&m, &h);
			if (!mark(&m, first, last))
				return too_much(&a);
			h = heat(&m);
		}
	}
	release(&a);
	return PyLong_FromUnsignedLongLong(m.clipped);
}

/* mark_bytes(words, table, addr, len) -> (pages, odd, clipped), or None */
CALLED(native_mark_bytes)
{
	struct args a = { .count = 0 };
	struct array in[4];
	struct marking m;
	uint64_t odd = 0;

	(void)module;
	if (nargs != 4 || !take_arrays(&a, args, "Qtqi", in))
		return failed(&a, "mark_bytes takes 4 arguments");
	const uint64_t *addr = in[2].data;
	const uint32_t *len = in[3].data;
	if (in[2].n != in[3].n || !begin_marking(&m, &in[0], &in[1]))
		return failed(&a, "columns or a table that do not fit");
	struct hot h = heat(&m);
	for (Py_ssize_t i = 0; i < in[2].n; i++) {
		uint64_t begin = addr[i], end = begin + len[i];
		uint64_t first = (begin >> 12) + !!(begin & 4095), last = end >> 12;

		odd += !!((begin | end) & 4095);
		if (first < last && !mark_hot(&h, first, last - first, true)) {
			cool(&m, &h);
			if (!mark(&m, first, last))
				return too_much(&a);
			h = heat(&m);
		}
	}
	cool(&m, &h);
	release(&a);
	return Py_BuildValue("KKK", (unsigned long long)m.pages, (unsigned long long)odd,
			     (unsigned long long)m.clipped);
}

/* A record that is not plainly in the row of last time; false where it is too much. */
static bool mark_odd(struct marking *m, uint64_t first, uint64_t pages, uint64_t least, uint64_t *bad)
{
	if (!pages || (first | pages) & (least - 1) || pages >= PAGE_NUMBERS || first >= PAGE_NUMBERS ||
	    in_rows(m, first, first + pages, false) != pages) {
		++*bad;
		return true;
	}
	return mark(m, first, first + pages);
}

/*
 * Records {le64 first page, le64 pages} that may be in guest memory, each field loaded once.
 * Those that are not made of aligned blocks of *least* pages (a power of two), or not wholly in
 * rows, are left out and counted in *bad.
 */
static bool mark_loaded(struct marking *m, const uint8_t *at, uint64_t n, uint64_t least,
			uint64_t *bad)
{
	struct hot h = heat(m);
	const uint8_t *end = at + 16 * n;

	for (; at < end; at += 16) {
		uint64_t first, pages;

		memcpy(&first, at, 8);
		memcpy(&pages, at + 8, 8);
		FETCHED(first);
		FETCHED(pages);
		if (pages && !((first | pages) & (least - 1)) && mark_hot(&h, first, pages, true))
			continue;
		cool(m, &h);
		if (!mark_odd(m, first, pages, least, bad))
			return false;
		h = heat(m);
	}
	cool(m, &h);
	return true;
}

/* mark_records(words, table, records, least) -> (pages, bad), or None */
CALLED(native_mark_records)
{
	struct args a = { .count = 0 };
	struct array in[3];
	struct marking m;
	uint64_t bad = 0;

	(void)module;
	if (nargs != 4 || !take_arrays(&a, args, "Qtp", in))
		return failed(&a, "mark_records takes 4 arguments");
	uint64_t least = PyLong_AsUnsignedLongLong(args[3]);
	if (PyErr_Occurred() || !least || !begin_marking(&m, &in[0], &in[1]))
		return failed(&a, "a table that does not fit the bitmap");
	if (!mark_loaded(&m, in[2].data, (uint64_t)in[2].n, least, &bad))
		return too_much(&a);
	release(&a);
	return Py_BuildValue("KK", (unsigned long long)m.pages, (unsigned long long)bad);
}

/*
 * mark_guest_records(words, table, memory, addr, counts, least) -> (buffers, pages, bad)
 *
 * The records of guest memory itself, counts[i] at each addr[i], up to a buffer that is not in one
 * mapping, or that is too much with those before it; of that one some bits may be set.
 */
CALLED(native_mark_guest_records)
{
	struct args a = { .count = 0 };
	struct array in[2], columns[2];
	struct guest g = { .held = NULL };
	struct marking m;
	uint64_t pages = 0, bad = 0;
	Py_ssize_t i;

	(void)module;
	if (nargs != 6 || !take_arrays(&a, args, "Qt", in) || !open_guest(&g, &a, args[2]) ||
	    !take_arrays(&a, args + 3, "qq", columns))
		return failed(&a, "mark_guest_records takes 6 arguments");
	uint64_t least = PyLong_AsUnsignedLongLong(args[5]);
	const uint64_t *addr = columns[0].data, *counts = columns[1].data;
	if (PyErr_Occurred() || !least || columns[0].n != columns[1].n ||
	    !begin_marking(&m, &in[0], &in[1]))
		return failed(&a, "columns or a table that do not fit");
	for (i = 0; i < columns[0].n; i++) {
		uint64_t odd = 0;
		const uint8_t *at =
			counts[i] >> 32 ? NULL : guest_bytes(&g, addr[i], 16 * counts[i]);

		if (!at || !mark_loaded(&m, at, counts[i], least, &odd))
			break;
		pages = m.pages;
		bad += odd;
	}
	close_guest(&g);
	release(&a);
	return Py_BuildValue("nKK", i, (unsigned long long)pages, (unsigned long long)bad);
}
