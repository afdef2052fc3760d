// SPDX-License-Identifier: Apache-2.0
/* Page numbers in guest memory, joined to ranges while they are read. */
#include "_native.h"

struct runs {
	uint64_t *start, *end;
	Py_ssize_t found, room;
	uint64_t low, high;           /* the run that is being built; none where low == high */
	uint64_t span_low, span_high; /* the span that the last page was in, in pages */
	uint64_t bad;
};

/* A new run begins at *page*; false where there is no room for the one before. */
static inline bool begin_run(struct runs *r, uint64_t page)
{
	if (r->low < r->high) {
		if (r->found == r->room)
			return false;
		r->start[r->found] = r->low;
		r->end[r->found++] = r->high;
	}
	r->low = page;
	r->high = page + 1;
	return true;
}

static bool in_a_span(struct runs *r, const struct guest *g, uint64_t page)
{
	for (Py_ssize_t i = 0; i < g->runs; i++) {
		r->span_low = (g->spans[2 * i] + 4095) >> 12;
		r->span_high = (g->spans[2 * i] + g->spans[2 * i + 1]) >> 12;
		if (page >= r->span_low && page < r->span_high)
			return true;
	}
	r->span_low = r->span_high = 0;
	return false;
}

/* A page that is not the next one of the run; false where there is no room for a new one. */
static bool other_page(struct runs *r, const struct guest *g, uint64_t page)
{
	if ((page < r->span_low || page >= r->span_high) && !in_a_span(r, g, page)) {
		r->bad++;
		return true;
	}
	if (page + 1 == r->low && r->low < r->high) {
		r->low--;
		return true;
	}
	return (page >= r->low && page < r->high) || begin_run(r, page);
}

/* The *n* le32 page numbers *at*, each read once; neighbours going up or down make one run. */
static bool join(struct runs *r, const struct guest *g, const uint8_t *at, int64_t n)
{
	const uint8_t *end = at + 4 * n;

	while (at < end) {
		/* the next page of the run, where there is one that is guest memory: in a register */
		uint64_t next = r->high, limit = r->low < r->high ? r->span_high : 0;
		uint32_t number = 0;

		for (; at < end; at += 4, next++) {
			memcpy(&number, at, 4);
			FETCHED(number);
			if (number != next || next >= limit)
				break;
		}
		r->high = next;
		if (at == end)
			break;
		if (!other_page(r, g, number))
			return false;
		at += 4;
	}
	return true;
}

/*
 * page_runs(memory, addr, words, out_start, out_end) -> (ranges, bad), or None
 *
 * The le32 page numbers at each guest-physical *addr*, *words* (int64) of them, as merged ranges;
 * pages outside guest memory are counted as bad.  None where an address is not in one mapping, or
 * the runs are more than there is room for.
 */
CALLED(native_page_runs)
{
	struct args a = { .count = 0 };
	struct array in[4];
	struct guest g = { .held = NULL };
	bool good = true;

	(void)module;
	if (nargs != 5 || !open_guest(&g, &a, args[0]) || !take_arrays(&a, args + 1, "qqQQ", in))
		return failed(&a, "page_runs takes 5 arguments");
	if (in[0].n != in[1].n)
		return failed(&a, "columns of different sizes");
	const uint64_t *addr = in[0].data;
	const int64_t *words = in[1].data;
	struct runs r = { .start = in[2].data, .end = in[3].data,
			  .room = in[2].n < in[3].n ? in[2].n : in[3].n };
	for (Py_ssize_t i = 0; i < in[0].n && good; i++) {
		if (words[i] <= 0)
			continue;
		const uint8_t *at =
			words[i] >> 30 ? NULL : guest_bytes(&g, addr[i], 4 * (uint64_t)words[i]);
		good = at && join(&r, &g, at, words[i]);
	}
	good = good && begin_run(&r, 0);
	close_guest(&g);
	Py_ssize_t n = good ? merge_ranges(r.start, r.end, r.found) : 0;
	release(&a);
	if (n < 0)
		return PyErr_NoMemory();
	if (!good)
		Py_RETURN_NONE;
	return Py_BuildValue("nK", n, (unsigned long long)r.bad);
}
