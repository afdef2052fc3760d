/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The safety contract of the skip bitmap, for a model checker (spin).  README.md says what is
 * modelled and what is not.  Every rule of the contract stands behind a switch of its own: built
 * with -D<SWITCH> the rule is gone, and spin must find a page that is lost.
 *
 * Invariant, asserted wherever content can vanish: no page whose content matters is left out of
 * the copy, or thrown away.
 */

#ifndef PAGES
#define PAGES 1
#endif
#ifndef EVENTS
#define EVENTS 1	/* resets, reboots, ... in one run */
#endif
/* Claims that must be refuted: no page is ever left out for this reason. */
#ifdef NEVER_BALLOONED
#define NEVER(p) page[p].ballooned
#endif
#ifdef NEVER_REPORTED
#define NEVER(p) (page[p].reported && !page[p].ballooned && !page[p].taken)
#endif
#ifdef NEVER_HINTED
#define NEVER(p) (tracking && page[p].taken && page[p].hinted && !page[p].walked)
#endif
#ifdef NEVER_WALKED
#define NEVER(p) (tracking && page[p].taken && page[p].walked && !page[p].hinted)
#endif
#ifdef NEVER_VERIFIED
#define NEVER(p) (!tracking && page[p].taken)
#endif
#ifdef NEVER
#define REACHED(p) assert(!(left_out && NEVER(p)))
#else
#define REACHED(p) skip
#endif
#ifdef NO_HINTS
#define HINTS false
#else
#define HINTS true
#endif
#ifdef NO_WALKS
#define WALKS false
#else
#define WALKS true
#endif

mtype:place = { free, used, giving, ballooning, taking, reporting, hinting };
mtype:value = { zero, poison, data };
mtype:record = { INFLATE, DEFLATE, REPORT, HINT, WALK };

typedef Page {
	mtype:place where = free;	/* who has it in the guest */
	mtype:value val = zero;		/* what reading it gives */
	bool hole = true;		/* of the backing file */
	bool written;			/* since tracking began */
	bool ballooned, reported, hinted, walked;	/* the skip bitmap */
	bool taken;			/* the consumer's copy of hinted, walked or the memmap */
};

Page page[PAGES];
chan ring = [2] of { mtype:record, byte /* round */, byte /* page */ };

bool running = true;	/* the guest */
bool known = true;	/* the driver is known to run: its rings do */
bool discards = true;	/* the device frees pages; --no-discard: it does not */
bool poisoned;		/* the guest expects its poison value in free pages */
bool fills;		/* the restore fills left-out pages with that value */
bool tracking;		/* the tracker notes writes */
byte wanted, last_id;	/* round id in the configuration space; the last one given out */
byte seen;		/* the id that the guest's driver has read */
byte generation;	/* grows when rounds are voided */
byte boot = 1, layout_boot;	/* boot of the guest; boot that the memmap layout came from, 0 none */
byte events = EVENTS;

#define MATTERS(p) (page[p].where == used || \
	(poisoned && (page[p].where == free || page[p].where == reporting)))

inline touch(p)
{
	page[p].hole = false;
	if
	:: tracking -> page[p].written = true
	:: else
	fi
}

inline put_free(p)	/* into the free lists, through the guest's free path */
{
	page[p].where = free;
	if
	:: poisoned -> page[p].val = poison; touch(p)
	:: else
	fi
}

inline discard(p)	/* the device punches a hole */
{
	assert(!MATTERS(p));
	page[p].val = zero;
	page[p].hole = true
}

inline some_page(p)
{
	if
	:: p = 0
#if PAGES > 1
	:: p = 1
#endif
	fi
}

/* ---- guest: its users, its allocator, its driver ---- */

proctype Guest()
{
	byte p;

end:	do
	:: atomic { running -> some_page(p);
		if
		:: page[p].where == free ->	/* somebody allocates and writes */
			page[p].where = used; page[p].val = data; touch(p)
		:: page[p].where == used -> put_free(p)
		:: page[p].where == free && nfull(ring) ->
			page[p].where = giving; ring!INFLATE(0, p)
		:: page[p].where == ballooning && nfull(ring) ->
#ifdef USE_BEFORE_TELLING
			put_free(p);
#else
			page[p].where = taking;
#endif
			ring!DEFLATE(0, p)
		:: page[p].where == free && nfull(ring) ->
			page[p].where = reporting; ring!REPORT(0, p)
		:: HINTS && page[p].where == free && seen && nfull(ring) ->
			page[p].where = hinting; ring!HINT(seen, p)
		:: page[p].where == hinting -> put_free(p)	/* at any time, seen by the device or not */
		:: WALKS && page[p].where == free && seen && nfull(ring) -> ring!WALK(seen, p)
		:: seen = wanted
		:: layout_boot = boot		/* the driver tells where its page structures are */
		fi;
		p = 0 }
	od
}

/* ---- device ---- */

proctype Device()
{
	byte p, round;
	mtype:record kind;

end:	do
	:: atomic { ring?kind(round, p) ->
		if
		:: kind == INFLATE ->
			page[p].ballooned = true; page[p].where = ballooning;
			if
			:: discards -> discard(p)
			:: else
			fi
		:: kind == DEFLATE ->
#ifndef DEFLATE_KEEPS
			page[p].ballooned = false;
#endif
			if
			:: page[p].where == taking -> put_free(p)
			:: else
			fi
		:: kind == REPORT ->
#ifndef DISCARD_POISONED
			if
			:: poisoned || !discards -> page[p].where = free
			:: else ->
#else
			if
			:: !discards -> page[p].where = free
			:: else ->
#endif
#ifdef ACKNOWLEDGE_BEFORE_DISCARD
				page[p].reported = true; page[p].where = free; goto discard_late
#else
				discard(p); page[p].reported = true; page[p].where = free
#endif
			fi
#ifndef STALE_ROUND
		:: (kind == HINT || kind == WALK) && round != wanted
		:: kind == HINT && round == wanted ->
#else
		:: kind == HINT ->
#endif
			page[p].hinted = true;
#ifdef DISCARD_HINTED
			discard(p);
#endif
#ifndef STALE_ROUND
		:: kind == WALK && round == wanted ->
#else
		:: kind == WALK ->
#endif
			page[p].walked = true;
#ifdef DISCARD_WALKED
			discard(p);
#endif
		fi;
done:		p = 0; round = 0; kind = INFLATE }
	od;
#ifdef ACKNOWLEDGE_BEFORE_DISCARD
discard_late:
	atomic { page[p].where == page[p].where -> discard(p); goto done }
#endif
}

inline publish()	/* a round: its bits start empty, its id is new */
{
	atomic {
#ifndef ROUND_KEEPS_BITS
		p = 0;
		do
		:: p < PAGES -> page[p].hinted = false; page[p].walked = false; p++
		:: else -> break
		od;
#endif
#ifdef REUSE_ID
		last_id = 1;
#else
		last_id++;
#endif
		wanted = last_id; p = 0
	}
}

inline void_round()
{
	generation++;
	wanted = 0;
	p = 0;
	do
	:: p < PAGES -> page[p].hinted = false; page[p].walked = false; p++
	:: else -> break
	od
}

inline void_balloon()
{
	p = 0;
	do
	:: p < PAGES -> page[p].ballooned = false; p++
	:: else -> break
	od
}

inline empty_ring()
{
	do
	:: nempty(ring) -> ring?_(_, _)
	:: empty(ring) -> break
	od
}

/* ---- what happens to a device ---- */

inline driver_gone()	/* the driver's pages are the guest's again, and nobody says so */
{
	empty_ring();
	last_id = 0; seen = 0;
	p = 0;
	do
	:: p < PAGES && page[p].where != used && page[p].where != free -> put_free(p); p++
	:: p < PAGES && (page[p].where == used || page[p].where == free) -> p++
	:: else -> break
	od
}

inline other_memory(first, end)	/* no write of this guest put the content there */
{
	p = first;
	do
	:: p < end -> page[p].where = used; page[p].val = data; page[p].hole = false;
		page[p].written = false; p++
	:: else -> break
	od
}

inline another_kernel()	/* uses all memory, has no driver, and does not tell the device */
{
	boot++; seen = 0;
	p = 0;
	do
	:: p < PAGES -> page[p].where = used; page[p].val = data; touch(p); p++
	:: else -> break
	od
}

proctype World()
{
	byte p, which;

end:	do
	:: atomic { running && events > 0 -> events--;
		if
		:: driver_gone();		/* the driver resets the device */
#ifndef RESET_KEEPS
			void_round(); void_balloon()
#endif
			; known = true
		:: boot++; driver_gone();	/* the machine is reset, or a kernel starts another */
#ifndef REBOOT_KEEPS
			void_round(); void_balloon()
#endif
			; known = true
		:: empty(ring) ->		/* reboot without driver: the rings stop, and no more is said */
			another_kernel();
#ifndef STOPPED_IS_KNOWN
			known = false
#endif
		:: some_page(which);		/* memory goes, other memory comes */
			if
			:: page[which].where == free || page[which].where == used ->
				other_memory(which, which + 1);
#ifndef MEMORY_CHANGE_KEEPS
				void_round()
#endif
			:: else
			fi
		:: driver_gone();		/* the backend starts anew; the guest was reset meanwhile */
#ifndef RESTART_KEEPS
			void_round(); void_balloon()
#endif
		:: empty_ring(); boot++; seen = 0;	/* the connection is lost, another guest comes */
			other_memory(0, PAGES);
#ifndef LOST_CONNECTION_KEEPS
			void_round(); void_balloon()
#endif
#ifdef SILENT_KEXEC
		:: empty(ring) -> another_kernel()	/* by kexec: not even the rings stop */
#endif
		fi;
		p = 0; which = 0 }
	od
}

/* ---- consumer ---- */

inline track()
{
	atomic {
		tracking = true; p = 0;
		do
		:: p < PAGES -> page[p].written = false; p++
		:: else -> break
		od;
		p = 0
	}
}

inline take_round()
{
	atomic {
		p = 0;
		do
		:: p < PAGES -> page[p].taken = page[p].hinted || page[p].walked; p++
		:: else -> break
		od;
		p = 0
	}
}

inline read_memmap()
{
	atomic {
		p = 0;
		do
		:: p < PAGES && layout_boot == boot ->
			page[p].taken = (page[p].where == free); p++
#ifdef ANY_LAYOUT
		:: p < PAGES && layout_boot && layout_boot != boot ->	/* whatever lies there now */
			page[p].taken = true; p++
#endif
		:: else -> break
		od;
		p = 0
	}
}

#ifdef IGNORE_WRITES
#define UNWRITTEN(p) true
#else
#define UNWRITTEN(p) (!page[p].written)
#endif
#ifdef IGNORE_POISON
#define POISON_OK true
#else
#define POISON_OK (!poisoned || fills)
#endif
#ifdef REPORTED_WITHOUT_HOLE
#define HOLE(p) true
#else
#define HOLE(p) page[p].hole
#endif
#ifdef BALLOONED_WITHOUT_HOLE
#define BALLOONED(p) page[p].ballooned
#else	/* a hole; where nothing is discarded, the driver must be known to run */
#define BALLOONED(p) (page[p].ballooned && (discards -> page[p].hole : known))
#endif
#ifdef IGNORE_GENERATION
#define STILL_VALID true
#else
#define STILL_VALID (generation == at)
#endif

inline copy()	/* of the stopped guest, and what a restore makes of it */
{
	atomic {
		p = 0;
		do
		:: p < PAGES ->
			left_out = BALLOONED(p) || (page[p].reported && HOLE(p)) ||
				(page[p].taken && STILL_VALID && UNWRITTEN(p) && POISON_OK);
			if
			:: left_out && poisoned && fills -> restored = poison
			:: left_out && !(poisoned && fills) -> restored = zero
			:: !left_out -> restored = page[p].val
			fi;
			assert(!MATTERS(p) || restored == page[p].val);
			REACHED(p);
			p++
		:: else -> break
		od
	}
}

proctype Consumer()
{
	byte p, at;
	bool left_out;
	mtype:value restored;

	if
	:: publish()	/* a round that nobody tracks writes for: its records may come late */
	:: true
	fi;
	if
	:: true ->	/* with write tracking, while the guest runs */
#ifdef TRACK_AFTER_PUBLISHING
		publish(); track();
#else
		track(); publish();
#endif
		at = generation;
		take_round();
		running = false
	:: true ->	/* verified skip */
#ifdef VERIFY_RUNNING
		read_memmap(); running = false
#else
		running = false; read_memmap()
#endif
		; at = generation
	fi;
	copy()
}

init {
	atomic {
		if
		:: poisoned = true; page[0].val = poison; page[0].hole = false
#if PAGES > 1
			; page[1].val = poison; page[1].hole = false
#endif
		:: true
		fi;
#ifndef DISCARDS
		if
		:: discards = false
		:: true
		fi;
#endif
		if
		:: fills = true
		:: true
		fi;
		run Guest(); run Device(); run World(); run Consumer()
	}
}
