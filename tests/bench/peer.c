/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The same work as the virtqueue engines and the balloon's handlers, in plain C: what the
 * benchmarks set our figures beside.  Written for the benchmark alone, and compiled by it.
 *
 * Two speeds.  The "library" loop does for each buffer what a vhost-user library in C does
 * (libvhost-user, of QEMU 11, is the model): calls into another object for pop, push and address
 * look-up, so not inlined; an allocated element with a scatter list for each buffer, every address
 * looked up in the table of regions; on push, the descriptors looked at again for the dirty log,
 * and the negotiated features asked for log, in-flight record and event index; the used index
 * published buffer by buffer, and the event index kept.  The "lean" loop is the least that is still safe: one region, bounds checked, no
 * allocation, used elements written in place, the index published once.
 *
 * A job is one queue.  All its memory belongs to the caller.
 */
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };
enum { AVAIL = 0x80, USED = 0x8000 };
enum work { RANGES, PFNS, WALK };
enum { PAGE_SHIFT = 12, MAX_SG = 1024, WALK_HEADER = 16, WALK_RANGES = 2 };

struct region {
	uint64_t gpa, size;
	uint8_t *va;
};

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t a, b; /* split: flags, next; packed: id, flags */
};

struct used_elem {
	uint32_t id, len;
};

struct record {
	uint64_t pfn, num;
};

struct job {
	uint32_t num, work, packed, event_idx;
	struct desc *desc;
	uint16_t *driver; /* split: available ring; packed: driver event suppression */
	uint16_t *device; /* split: used ring; packed: device event suppression */
	const struct region *regions;
	uint32_t nregions, inuse;
	uint16_t last_avail, shadow_avail, used, signalled;
	uint32_t avail_wrap, used_wrap;
	uint64_t *bitmap, pages;
	uint64_t buffers, bad, notify;
	volatile uint64_t protocol; /* features of the protocol: log and in-flight record, both off */
	volatile uint32_t broken;
};

enum { LOG = 1, INFLIGHT = 2 };
#define LIBRARY_CALL __attribute__((noinline))

/* ---- bits and guest memory ---- */

static inline void set_range(uint64_t *words, uint64_t first, uint64_t last)
{
	uint64_t a = first >> 6, b = last >> 6;
	uint64_t head = ~0ULL << (first & 63), tail = (1ULL << (last & 63)) - 1;

	if (a == b) {
		words[a] |= head & tail;
		return;
	}
	if (first & 63)
		words[a++] |= head;
	memset(&words[a], 0xff, (b - a) * 8);
	if (last & 63)
		words[b] |= tail;
}

static inline bool record_pages(struct job *j, uint64_t first, uint64_t count)
{
	if (first >= j->pages || count > j->pages - first)
		return false;
	if (count)
		set_range(j->bitmap, first, first + count);
	return true;
}

static inline bool record_bytes(struct job *j, uint64_t addr, uint64_t len)
{
	uint64_t first = (addr + 4095) >> PAGE_SHIFT, last = (addr + len) >> PAGE_SHIFT;

	return record_pages(j, first, last > first ? last - first : 0);
}

static void record_payload(struct job *j, const uint8_t *data, size_t len)
{
	if (j->work == PFNS) {
		for (size_t i = 0; i + 4 <= len; i += 4) {
			uint32_t pfn;

			memcpy(&pfn, data + i, 4);
			if (pfn < j->pages)
				j->bitmap[pfn >> 6] |= 1ULL << (pfn & 63);
			else
				j->bad++;
		}
		return;
	}
	uint16_t type;

	memcpy(&type, data, 2);
	if (len < WALK_HEADER || type != WALK_RANGES) {
		j->bad++;
		return;
	}
	for (size_t i = WALK_HEADER; i + 16 <= len; i += 16) {
		struct record r;

		memcpy(&r, data + i, 16);
		j->bad += !r.num || !record_pages(j, r.pfn, r.num);
	}
}

/* ---- the library loop ---- */

struct element {
	unsigned index, slots, in_num, out_num, at;
	struct iovec *in, *out;
};

LIBRARY_CALL static void *lookup(const struct job *j, uint64_t addr, uint64_t *len)
{
	for (uint32_t i = 0; i < j->nregions; i++) {
		const struct region *r = &j->regions[i];

		if (addr >= r->gpa && addr < r->gpa + r->size) {
			if (addr + *len > r->gpa + r->size)
				*len = r->gpa + r->size - addr;
			return r->va + (addr - r->gpa);
		}
	}
	return NULL;
}

static bool to_guest(const struct job *j, const void *va, uint64_t *addr)
{
	for (uint32_t i = 0; i < j->nregions; i++) {
		const struct region *r = &j->regions[i];

		if ((uint8_t *)va >= r->va && (uint8_t *)va < r->va + r->size) {
			*addr = (uint8_t *)va - r->va + r->gpa;
			return true;
		}
	}
	return false;
}

LIBRARY_CALL static bool map_desc(struct job *j, unsigned *count, struct iovec *iov, uint64_t addr, uint64_t len)
{
	if (!len)
		return false;
	while (len) {
		uint64_t part = len;

		if (*count == MAX_SG)
			return false;
		iov[*count].iov_base = lookup(j, addr, &part);
		if (!iov[*count].iov_base)
			return false;
		iov[(*count)++].iov_len = part;
		addr += part;
		len -= part;
	}
	return true;
}

LIBRARY_CALL static struct element *new_element(unsigned in_num, unsigned out_num)
{
	struct element *e = malloc(sizeof(*e) + (in_num + out_num) * sizeof(struct iovec));

	e->in_num = in_num;
	e->out_num = out_num;
	e->in = (struct iovec *)(e + 1);
	e->out = e->in + in_num;
	return e;
}

/* Maps one chain; *table* and *count* are the ring's or an indirect table's. */
LIBRARY_CALL static struct element *pop_chain(struct job *j, unsigned head)
{
	struct iovec iov[MAX_SG];
	struct desc *table = j->desc, *d = &table[head];
	unsigned count = j->num, visited = 0, in = 0, out = 0, slots = 1, at = head;
	uint16_t id = head, flags = j->packed ? d->b : d->a;

	if (j->packed) {
		id = d->a;
		while (j->desc[at].b & NEXT) { /* the id is in the last descriptor of a list */
			at = at + 1 == j->num ? 0 : at + 1;
			id = j->desc[at].a;
			slots++;
		}
		at = head;
	}
	if (flags & INDIRECT) {
		uint64_t size = d->len;

		if (size % 16 || !size)
			return NULL;
		count = size / 16;
		table = lookup(j, d->addr, &size);
		if (!table || size != count * 16)
			return NULL;
		d = table;
		at = 0;
		slots = 1;
	}
	for (;;) {
		flags = j->packed ? d->b : d->a;
		if (flags & WRITE) {
			if (!map_desc(j, &in, iov + out, d->addr, d->len))
				return NULL;
		} else if (in || !map_desc(j, &out, iov, d->addr, d->len)) {
			return NULL;
		}
		if (++visited > count)
			return NULL;
		if (j->packed && table != j->desc) {
			if (visited == count)
				break;
			d++;
			continue;
		}
		if (!(flags & NEXT))
			break;
		at = j->packed ? (at + 1 == j->num ? 0 : at + 1) : d->b;
		if (at >= count)
			return NULL;
		atomic_thread_fence(memory_order_acquire);
		d = &table[at];
	}
	struct element *e = new_element(in, out);

	e->index = id;
	e->slots = slots;
	memcpy(e->out, iov, out * sizeof(*iov));
	memcpy(e->in, iov + out, in * sizeof(*iov));
	j->inuse += slots;
	e->at = head;
	if (j->protocol & INFLIGHT)
		j->bad++;
	return e;
}

static bool split_empty(struct job *j)
{
	if (j->shadow_avail != j->last_avail)
		return false;
	j->shadow_avail = *(volatile uint16_t *)&j->driver[1];
	return j->shadow_avail == j->last_avail;
}

static bool packed_ready(const struct job *j)
{
	uint16_t flags = *(volatile uint16_t *)&j->desc[j->last_avail].b;

	return !!(flags & AVAIL) == j->avail_wrap && !!(flags & USED) != j->avail_wrap;
}

LIBRARY_CALL static struct element *pop(struct job *j)
{
	unsigned head;

	if (j->broken)
		return NULL;
	if (j->packed) {
		if (!packed_ready(j))
			return NULL;
		atomic_thread_fence(memory_order_acquire);
		head = j->last_avail;
	} else {
		if (split_empty(j))
			return NULL;
		atomic_thread_fence(memory_order_acquire);
		if (j->inuse >= j->num)
			return NULL;
		head = *(volatile uint16_t *)&j->driver[2 + j->last_avail % j->num];
		if (head >= j->num)
			return NULL;
		j->last_avail++;
		if (j->event_idx)
			*(volatile uint16_t *)&j->device[2 + 4 * j->num] = j->last_avail;
	}
	struct element *e = pop_chain(j, head);

	if (e && j->packed) {
		j->last_avail += e->slots;
		if (j->last_avail >= j->num) {
			j->last_avail -= j->num;
			j->avail_wrap ^= 1;
		}
	}
	return e;
}

/* What the device wrote, for a migrating front-end: the chain is followed until *len* is used up. */
LIBRARY_CALL static void log_writes(struct job *j, const struct element *e, uint32_t len)
{
	const struct desc *d = &j->desc[e->at];
	unsigned seen = 0;

	if ((j->packed ? d->b : d->a) & INDIRECT) {
		uint64_t size = d->len;

		if (size % 16)
			return;
		d = lookup(j, d->addr, &size);
		if (!d)
			return;
	}
	do {
		uint32_t part = d->len < len ? d->len : len;

		if (++seen > j->num)
			return;
		if ((j->packed ? d->b : d->a) & WRITE) {
			if (part && j->protocol & LOG)
				j->bad++; /* no log is kept in a benchmark */
			len -= part;
		}
	} while (len && (j->packed ? d->b : d->a) & NEXT && (d = &j->desc[d->b % j->num]));
}

LIBRARY_CALL static void push(struct job *j, struct element *e, uint32_t len)
{
	if (j->broken)
		return;
	log_writes(j, e, len);
	if (j->protocol & INFLIGHT)
		j->bad++; /* nor is such a record */
	if (j->packed) {
		struct desc *d = &j->desc[j->used];
		uint16_t flags = (j->used_wrap ? AVAIL | USED : 0) | (len ? WRITE : 0);

		d->a = e->index;
		d->len = len;
		atomic_thread_fence(memory_order_release);
		*(volatile uint16_t *)&d->b = flags;
		j->used += e->slots;
		if (j->used >= j->num) {
			j->used -= j->num;
			j->used_wrap ^= 1;
		}
	} else {
		struct used_elem *ring = (struct used_elem *)(j->device + 2);

		ring[j->used % j->num].id = e->index;
		ring[j->used % j->num].len = len;
		atomic_thread_fence(memory_order_release);
		*(volatile uint16_t *)&j->device[1] = ++j->used;
		if (j->protocol & LOG)
			j->bad++;
	}
	j->inuse -= e->slots;
	if (j->protocol & INFLIGHT)
		j->bad++;
}

static void notify(struct job *j)
{
	atomic_thread_fence(memory_order_seq_cst);
	if (j->packed) {
		j->notify += (*(volatile uint16_t *)&j->driver[1] & 3) != 1;
		return;
	}
	uint16_t old = j->signalled, event = *(volatile uint16_t *)&j->driver[2 + j->num];

	j->signalled = j->used;
	if (j->event_idx)
		j->notify += (uint16_t)(j->used - event - 1) < (uint16_t)(j->used - old);
	else
		j->notify += !(j->driver[0] & 1);
}

/* Serves everything that is available; the buffers served. */
static uint64_t library_serve(struct job *j)
{
	struct element *e;
	uint64_t done = 0, addr;

	while ((e = pop(j))) {
		for (unsigned i = 0; j->work == RANGES && i < e->in_num; i++)
			if (!to_guest(j, e->in[i].iov_base, &addr) ||
			    !record_bytes(j, addr, e->in[i].iov_len))
				j->bad++;
		for (unsigned i = 0; j->work != RANGES && i < e->out_num; i++)
			record_payload(j, e->out[i].iov_base, e->out[i].iov_len);
		push(j, e, 0);
		free(e);
		done++;
	}
	notify(j);
	j->buffers += done;
	return done;
}

/* ---- the lean loop ---- */

static inline uint8_t *within(const struct job *j, uint64_t addr, uint64_t len)
{
	const struct region *r = j->regions;
	uint64_t offset = addr - r->gpa;

	if (offset > r->size || len > r->size - offset)
		return NULL;
	return r->va + offset;
}

static inline void serve_desc(struct job *j, const struct desc *d, uint16_t flags)
{
	uint8_t *at = within(j, d->addr, d->len);

	if (!at || !!(flags & WRITE) != (j->work == RANGES))
		j->bad++;
	else if (flags & WRITE)
		j->bad += !record_bytes(j, d->addr, d->len);
	else
		record_payload(j, at, d->len);
}

static void serve_table(struct job *j, const struct desc *d)
{
	const struct desc *table = (const struct desc *)within(j, d->addr, d->len);
	unsigned count = d->len / 16;

	if (!table || d->len % 16 || count > j->num) {
		j->bad++;
		return;
	}
	for (unsigned i = 0; i < count; i++)
		serve_desc(j, &table[i], j->packed ? table[i].b : table[i].a);
}

static uint64_t lean_split(struct job *j)
{
	struct used_elem *ring = (struct used_elem *)(j->device + 2);
	uint16_t avail = *(volatile uint16_t *)&j->driver[1], mask = j->num - 1;
	uint16_t count = avail - j->last_avail;

	atomic_thread_fence(memory_order_acquire);
	if (count > j->num)
		return 0;
	for (unsigned i = 0; i < count; i++) {
		uint16_t head = j->driver[2 + ((j->last_avail + i) & mask)] & mask;
		unsigned at = head, visited = 0;

		for (;;) {
			const struct desc *d = &j->desc[at];

			if (d->a & INDIRECT)
				serve_table(j, d);
			else
				serve_desc(j, d, d->a);
			if (!(d->a & NEXT) || ++visited == j->num)
				break;
			at = d->b & mask;
		}
		ring[j->used & mask].id = head;
		ring[j->used++ & mask].len = 0;
	}
	j->last_avail = avail;
	atomic_thread_fence(memory_order_release);
	*(volatile uint16_t *)&j->device[1] = j->used;
	return count;
}

static uint64_t lean_packed(struct job *j)
{
	uint64_t done = 0;

	while (packed_ready(j)) {
		unsigned at = j->last_avail, slots = 1;
		const struct desc *d = &j->desc[at];

		atomic_thread_fence(memory_order_acquire);
		for (;; slots++) {
			if (d->b & INDIRECT)
				serve_table(j, d);
			else
				serve_desc(j, d, d->b);
			if (!(d->b & NEXT) || slots == j->num)
				break;
			at = at + 1 == j->num ? 0 : at + 1;
			d = &j->desc[at];
		}
		struct desc *u = &j->desc[j->used];

		u->a = d->a;
		u->len = 0;
		atomic_thread_fence(memory_order_release);
		u->b = j->used_wrap ? AVAIL | USED : 0;
		j->last_avail += slots;
		if (j->last_avail >= j->num) {
			j->last_avail -= j->num;
			j->avail_wrap ^= 1;
		}
		j->used += slots;
		if (j->used >= j->num) {
			j->used -= j->num;
			j->used_wrap ^= 1;
		}
		done++;
	}
	return done;
}

static uint64_t lean_serve(struct job *j)
{
	uint64_t done = j->packed ? lean_packed(j) : lean_split(j);

	notify(j);
	j->buffers += done;
	return done;
}

/* Ranges into a bitmap, the rings left out: records of 16 bytes, bounds checked. */
static uint64_t plain_ranges(struct job *j, const struct record *records, uint64_t count)
{
	uint64_t bad = 0;

	for (uint64_t i = 0; i < count; i++)
		bad += !records[i].num || !record_pages(j, records[i].pfn, records[i].num);
	return bad;
}

/* ---- timed from within, so that no call from Python is in the figures ---- */

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

/* Nanoseconds that serving everything available took; *done: the buffers. */
uint64_t timed_serve(struct job *j, int lean, uint64_t *done)
{
	uint64_t start = now();

	*done = lean ? lean_serve(j) : library_serve(j);
	return now() - start;
}

uint64_t timed_ranges(struct job *j, const struct record *records, uint64_t count)
{
	uint64_t start = now();

	j->bad += plain_ranges(j, records, count);
	return now() - start;
}

/* Nanoseconds to copy *bytes*, *repeat* times. */
uint64_t timed_copy(void *to, const void *from, uint64_t bytes, uint64_t repeat)
{
	uint64_t start = now();

	for (uint64_t i = 0; i < repeat; i++) {
		memcpy(to, from, bytes);
		atomic_signal_fence(memory_order_seq_cst);
	}
	return now() - start;
}
