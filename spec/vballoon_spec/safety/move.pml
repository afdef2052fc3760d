/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moving a machine, for a model checker (spin): source, guardian, link and destination, each of
 * which can die at any moment.  move.md says what is modelled.  Every rule of the protocol has a
 * switch of its own: built with -D<SWITCH> the rule is missing, and spin must find a fault.
 *
 * Never two: the guest never runs at both places.
 * Never torn: the guest runs at the destination only with all of its memory of one moment.
 * Never lost: from the note "gone" until the guest has run at the destination, both have it whole.
 * In the end: one runs; or none, both have printed what to do, and "gone" is noted.
 */

mtype = { PART, MANIFEST, VERIFIED, COMMIT, ABORT, RUNNING, REFUSED };

chan down = [3] of { mtype, bool /* of this move */ };	/* source to destination */
chan up = [2] of { mtype, bool };			/* destination to source */

bool link = true;
bool source_runs = true;	/* the guest, at the source */
bool source_has = true;		/* QEMU has not ended */
bool touched;			/* somebody resumed the guest after it was stopped */
bool gone;			/* in the journal, on disk */
bool source_done;		/* the sender and its guardian have ended */
bool source_said;		/* one of them printed what to do */

bool runs;			/* the guest, at the destination */
bool ran;			/* it has run there */
bool parts;			/* all memory has arrived */
bool durable;			/* all of it is checked and on the disk */
bool pending;			/* the mark on the disk that COMMIT has not come */
bool destination_done, destination_said;

byte deaths = 2;		/* how many processes may die */

#define DIES	(deaths > 0) -> deaths--

#define SAFE	assert(!(source_runs && runs)); \
		assert(!runs || (parts && !touched)); \
		assert(!gone || ran || (source_has && durable))

inline send(channel, message)
{
	if
	:: link && nfull(channel) -> channel ! message, true
	:: !link	/* written, and lost */
	fi
}

inline undo()	/* by the sender, its guardian, or --undo */
{
	if
#ifndef GUARDIAN_IGNORES_GONE
	:: gone -> source_said = true
#endif
	:: else -> source_runs = source_has
	fi;
	SAFE
}

proctype Source()
{
	mtype message;
	bool ours;

	source_runs = false;
	/* the copy */
	if
	:: true -> send(down, PART)
	:: DIES; goto dead
	fi;
	if
	:: true -> touched = true; source_runs = true	/* 'cont' by somebody */
	:: true
	fi;
	send(down, MANIFEST);
#ifdef QUIT_ON_WRITE
	gone = true; source_has = false; SAFE; goto over;
#endif
	/* the offer */
	do
	:: up ? message, ours ->
		if
#ifdef ANY_VERIFIED
		:: message == VERIFIED -> break
#else
		:: message == VERIFIED && ours -> break
#endif
		:: else -> goto aborted
		fi
	:: !link && empty(up) -> goto aborted
	:: DIES; goto dead
	od;
#ifndef NO_RESUME_CHECK
	if
	:: touched -> goto aborted
	:: else
	fi;
#endif
	/* the commit */
#if !defined(NO_NOTE) && !defined(NOTE_AFTER_COMMIT)
	gone = true; SAFE;
#endif
	if
	:: true
	:: DIES; goto dead
	fi;
	send(down, COMMIT);
#ifdef QUIT_ON_COMMIT
	source_has = false; SAFE;
#endif
	if
	:: true
	:: DIES; goto dead
	fi;
#ifdef NOTE_AFTER_COMMIT
	gone = true; SAFE;
#endif
	do
	:: up ? message, ours ->
		if
		:: message == RUNNING && ours -> source_has = false; SAFE; goto over
		:: else -> break
		fi
	:: !link && empty(up) -> break
	:: DIES; goto dead
	od;
#ifdef RESUME_AFTER_GONE
	source_runs = source_has; SAFE;
#else
	source_said = true;
#endif
	goto over;

aborted:
	/* ABORT goes out before the guest is resumed */
	send(down, ABORT);
	undo();
	goto over;

dead:	/* the guardian, or after its death somebody with --undo */
	undo();
over:
	source_done = true
}

proctype Destination()
{
	mtype message;
	bool ours, all;

	do
	:: down ? message, ours ->
		if
		:: message == PART && ours ->
			if
			:: parts = true
			:: true	/* damaged on the way */
			fi
		:: message == MANIFEST && ours -> all = true; break
		:: else
		fi
	:: !link && empty(down) -> break
	:: DIES; goto dead
	od;
#ifndef UNCHECKED
	if
	:: !(all && parts) -> send(up, REFUSED); goto over	/* drops what has come */
	:: else
	fi;
#endif
	pending = true;
#ifdef VERIFIED_BEFORE_DISK
	send(up, VERIFIED);
	if
	:: true
	:: DIES; goto dead
	fi;
	durable = true;
#else
	durable = true;
	send(up, VERIFIED);
#endif
#ifdef RUN_ON_VERIFIED
	goto committed;
#endif
	do
	:: down ? message, ours ->
		if
#ifdef ANY_COMMIT
		:: message == COMMIT -> goto committed
#else
		:: message == COMMIT && ours -> goto committed
#endif
		:: message == ABORT && ours -> durable = false; goto over
		:: else
		fi
	:: !link && empty(down) -> break
	:: DIES; goto dead
	od;
#ifdef DROP_ON_LOSS
	durable = false; SAFE;
#endif
	destination_said = true;
	goto over;

committed:
	pending = false;
	if
	:: true
	:: DIES; goto dead
	:: true -> send(up, REFUSED); destination_said = true; goto over /* QEMU does not start */
	fi;
	runs = true; ran = true; SAFE;
	if
	:: true
	:: DIES; destination_said = true; goto over	/* QEMU lives on */
	fi;
	send(up, RUNNING);
	goto over;

dead:	/* what is on the disk is found when somebody looks */
	destination_said = durable;
#ifdef NO_PENDING_MARK
	if
	:: durable -> runs = true; ran = true; SAFE
	:: else
	fi;
#endif
over:
	link = false;	/* its end closes the link, what was sent before still arrives */
	destination_done = true
}

proctype Link()		/* breaks at any moment, and loses what is under way */
{
	mtype message;
	bool ours;

	link = false;
	do
	:: down ? message, ours
	:: up ? message, ours
	:: true -> break
	od
}

proctype Stranger()	/* a message of another move, at any moment */
{
end:	if
	:: down ! COMMIT, false
	:: up ! VERIFIED, false
	:: true
	fi
}

init {
	atomic {
		run Stranger();
		run Source();
		run Destination();
		if
		:: run Link()
		:: true
		fi
	}
	source_done && destination_done;
	SAFE;
#ifdef NEVER_MOVED
	assert(!runs);
#endif
#ifdef NEVER_KEPT
	assert(!source_runs);
#endif
#ifdef NEVER_UNDECIDED
	assert(source_runs || runs);
#endif
	assert(source_runs || runs || (gone && source_said && destination_said))
}
