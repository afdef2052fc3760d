// SPDX-License-Identifier: GPL-2.0-only
/*
 * The rounds of the walk queue: which one the device wants, running it,
 * ending it early.
 *
 * One work item does everything, so rounds and layouts never mix. A
 * configuration change only notes that the command id has to be read again: the
 * work item reads it before a round, and during a round between two slices
 * (a read may cost a round trip to the host, so it is not done at every slice).
 */
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/mm.h>

#include "compat.h"
#include "params.h"
#include "session.h"

#define LAYOUT_DELAY msecs_to_jiffies(500)

#define CREATE_TRACE_POINTS
#include "trace.h"

static u32 wanted_round(struct vbw_session *session)
{
	u32 id;

	/* Clear the flag before reading, so that a later change sets it again. */
	smp_store_mb(session->changed, false);
	virtio_cread_le(session->shared->vdev, struct vballoon_config,
			free_page_walk_cmd_id, &id);
	return id;
}

/* A round is over when the device wants another one, or none. */
static bool round_aborted(struct vbw_push *push)
{
	struct vbw_session *session = container_of(push, struct vbw_session, push);

	if (vbw_stopping(session->shared))
		return true;
	if (!READ_ONCE(session->changed))
		return false;
	if (wanted_round(session) == push->round)
		return false;
	/* Not served yet: the work item has to look again after this round. */
	WRITE_ONCE(session->changed, true);
	return true;
}

static bool round_disturbed(struct vbw_push *push)
{
	struct vbw_session *session = container_of(push, struct vbw_session, push);

	return vbw_stopping(session->shared) || READ_ONCE(session->changed);
}

/* END has to be sent for a round that is not wanted any more, too. */
static bool stopping(struct vbw_push *push)
{
	return vbw_stopping(container_of(push, struct vbw_session, push)->shared);
}

static int send_begin(struct vbw_session *session, int min_order)
{
	struct vballoon_walk_begin begin = {
		.time_ns = cpu_to_le64(ktime_get_ns()),
		.managed_pages = cpu_to_le64(totalram_pages()),
		.free_pages = cpu_to_le64(global_zone_page_state(NR_FREE_PAGES)),
		.page_shift = cpu_to_le32(PAGE_SHIFT),
		.min_order = cpu_to_le32(min_order),
		.max_order = cpu_to_le32(VBW_MAX_ORDER),
		.slice_ns = cpu_to_le32(vbw_slice_ns()),
		.layout_id = cpu_to_le32(vbw_memmap_layout_id()),
	};
	struct zone *zone;
	u32 zones = 0;
	int nid, i;

	for_each_online_node(nid) {
		for (i = 0; i < MAX_NR_ZONES; i++) {
			zone = &NODE_DATA(nid)->node_zones[i];
			zones += populated_zone(zone);
		}
	}
	begin.nr_zones = cpu_to_le32(zones);
	return vbw_push_message(&session->push, VBALLOON_WALK_BEGIN, 0, &begin, sizeof(begin),
				NULL, 0, 0);
}

static int send_end(struct vbw_session *session, u64 started, int result)
{
	struct vbw_push *push = &session->push;
	struct free_walk *walk = &session->walk;
	u64 now = ktime_get_ns();
	struct vballoon_walk_end end = {
		.time_ns = cpu_to_le64(now),
		.duration_ns = cpu_to_le64(now - started),
		.blocks = cpu_to_le64(walk->blocks),
		.ranges = cpu_to_le64(push->sent_ranges),
		.pages = cpu_to_le64(push->sent_pages),
		.free_pages = cpu_to_le64(global_zone_page_state(NR_FREE_PAGES)),
		.longest_hold_ns = cpu_to_le32(walk->longest_hold_ns),
		.buffers = cpu_to_le32(push->sent_buffers),
		.slices = cpu_to_le32(walk->slices),
		.result = cpu_to_le32(-result),
	};

	session->duration_ns = now - started;
	return vbw_push_message(push, VBALLOON_WALK_END, 0, &end, sizeof(end), NULL, 0, 0);
}

static int relax(void *opaque)
{
	cond_resched();
	return vbw_push_room(opaque);
}

static int walk_round(struct vbw_session *session, int min_order)
{
	struct vbw_push *push = &session->push;
	int err, flushed;

	session->walk = (struct free_walk){ .relax = relax };
	err = send_begin(session, min_order);
	if (err)
		return err;
	err = walk_free_mem_block_paced(push, min_order, vbw_push_range, &session->walk);
	flushed = vbw_push_flush(push);
	return err ? err : flushed;
}

static void run_round(struct vbw_session *session, u32 round)
{
	struct vbw_push *push = &session->push;
	u64 started;
	u32 order;
	int err;

	virtio_cread_le(session->shared->vdev, struct vballoon_config,
			free_page_walk_min_order, &order);
	order = min_t(u32, order, VBW_MAX_ORDER);
	session->round = round;
	session->rounds++;

	vbw_push_until(push, round_disturbed, round_aborted);
	vbw_push_start(push, round);
	started = ktime_get_ns();
	err = walk_round(session, order);
	session->aborted += err == -ECANCELED;
	session->result = err;

	/* Without a BEGIN there is no END either. */
	vbw_push_until(push, stopping, stopping);
	if (!push->seq || send_end(session, started, err))
		return;
	vbw_push_kick(push);
	trace_vbw_walk(round, order, err, &session->walk, push, session->duration_ns);
}

/*
 * Sends the layout. Where that fails for a reason that may pass, it is due again:
 * before the next round, or when memory changes again.
 */
static void send_layout(struct vbw_session *session)
{
	int err;

	/* Clear the flag first, so that a later change sets it again. */
	WRITE_ONCE(session->send_layout, false);
	vbw_push_until(&session->push, stopping, stopping);
	vbw_push_start(&session->push, 0);
	err = vbw_memmap_send(&session->push);
	if (!err) {
		session->layouts++;
		vbw_push_kick(&session->push);
	} else if (err == -ENOMEM && !vbw_stopping(session->shared)) {
		queue_delayed_work(session->wq, &session->layout_work, LAYOUT_DELAY);
	}
}

static void session_work(struct work_struct *work)
{
	struct vbw_session *session = container_of(work, struct vbw_session, work);
	u32 id;

	do {
		id = wanted_round(session);
		if (id == session->round)
			id = VBALLOON_CMD_ID_STOP;
		if (READ_ONCE(session->send_layout) || id >= VBALLOON_CMD_ID_FIRST)
			send_layout(session);
		if (id >= VBALLOON_CMD_ID_FIRST)
			run_round(session, id);
	} while (READ_ONCE(session->changed) && !vbw_stopping(session->shared));
}

/**
 * vbw_session_changed - the configuration changed: look at the command id
 * @session: the rounds
 */
void vbw_session_changed(struct vbw_session *session)
{
	if (!session->push.vq)
		return;
	WRITE_ONCE(session->changed, true);
	wake_up(&session->push.wait);
	vbw_queue_work(session->shared, session->wq, &session->work);
}

static void layout_work(struct work_struct *work)
{
	struct vbw_session *session = container_of(to_delayed_work(work), struct vbw_session,
						   layout_work);

	WRITE_ONCE(session->send_layout, true);
	vbw_queue_work(session->shared, session->wq, &session->work);
}

/*
 * The layout that was sent does not hold any more, or not for all memory. Memory
 * often comes in many small steps, and a layout is always of all memory, so wait for
 * the next steps.
 */
static void memory_changed(struct vbw_memmap_listener *listener)
{
	struct vbw_session *session = container_of(listener, struct vbw_session, listener);

	queue_delayed_work(session->wq, &session->layout_work, LAYOUT_DELAY);
}

/**
 * vbw_session_setup - allocate what rounds need, once for a device
 * @session: to be filled in
 * @shared: of the device
 * @wq: for rounds, which may take long
 *
 * Where there is no memory for the buffers, the walk queue is not used.
 */
void vbw_session_setup(struct vbw_session *session, struct vbw_shared *shared,
		       struct workqueue_struct *wq)
{
	session->shared = shared;
	session->wq = wq;
	session->listener.changed = memory_changed;
	INIT_WORK(&session->work, session_work);
	INIT_DELAYED_WORK(&session->layout_work, layout_work);
	if (!vbw_has(shared, VBALLOON_F_FREE_PAGE_WALK))
		return;
	if (vbw_push_init(&session->push, vbw_buffer_count()))
		dev_warn(&shared->vdev->dev, "no memory for walks; the balloon works without\n");
}

/**
 * vbw_session_free - undo vbw_session_setup()
 * @session: the rounds
 */
void vbw_session_free(struct vbw_session *session)
{
	if (session->push.buffers)
		vbw_push_free(&session->push);
}

/**
 * vbw_session_start - begin to serve rounds; the device is ready
 * @session: the rounds
 * @vq: the walk queue, or NULL
 */
void vbw_session_start(struct vbw_session *session, struct virtqueue *vq)
{
	if (!vq || !session->push.nr)
		return;
	session->round = 0;
	vbw_push_attach(&session->push, vq);
	vbw_memmap_listen(&session->listener);
	layout_work(&session->layout_work.work);
}

/**
 * vbw_session_cancel - end rounds and layouts; the device stops
 * @session: the rounds
 */
void vbw_session_cancel(struct vbw_session *session)
{
	if (!session->push.vq)
		return;
	vbw_memmap_unlisten(&session->listener);
	wake_up(&session->push.wait);
	/* In this order: the first may queue the second, the second not the first. */
	cancel_work_sync(&session->work);
	cancel_delayed_work_sync(&session->layout_work);
}

/**
 * vbw_session_detach - take the buffers back; the device has been reset
 * @session: the rounds
 */
void vbw_session_detach(struct vbw_session *session)
{
	if (session->push.vq)
		vbw_push_detach(&session->push);
}
