// SPDX-License-Identifier: Apache-2.0
/* Read page numbers from guest memory, and join them to ranges. */
#include "_native.h"

struct runs {
	uint64_t *start, *end;
	Py_ssize_t found, room;
	uint64_t low, high;           /* the run being built; none if low == high */
	uint64_t span_low, span_high; /* the span that the last page was in, in pages */
	uint64_t bad;
};

/* Begin a new run at *page*.  Return false if there is no room for the previous one. */
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

/* Add a page that does not extend the run upwards.  Return false if there is no room for a new run. */
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

/* Join the *n* le32 page numbers *at*, each read once.  Consecutive ones, up or down, make one run. */
static bool join(struct runs *r, const struct guest *g, const uint8_t *at, int64_t n)
{
	const uint8_t *end = at + 4 * n;

	while (at < end) {
		/* the next page of the run, in a register; limit is 0 if there is no run */
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
 * Return the *words* (int64) le32 page numbers at each guest-physical *addr* as merged ranges.  Count
 * pages outside guest memory as bad.  Return None if an address is not in one mapping, or if there are
 * more runs than room.
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
