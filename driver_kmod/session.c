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
#include <linux/ktime.h>
#include <linux/mm.h>

#include "compat.h"
#include "vbw.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

static struct vbw_device *to_device(struct vbw_session *session)
{
	return container_of(session, struct vbw_device, session);
}

static u32 wanted_round(struct vbw_session *session)
{
	u32 id;

	/* A change that comes after this must be seen again, one before be read now. */
	smp_store_mb(session->changed, false);
	virtio_cread_le(to_device(session)->vdev, struct vballoon_config,
			free_page_walk_cmd_id, &id);
	return id;
}

/* A round is over when the device wants another one, or none. */
static bool round_aborted(struct vbw_push *push)
{
	struct vbw_session *session = container_of(push, struct vbw_session, push);

	if (READ_ONCE(session->stopping))
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

	return READ_ONCE(session->stopping) || READ_ONCE(session->changed);
}

/* END has to be sent for a round that is not wanted any more, too. */
static bool stopping(struct vbw_push *push)
{
	return READ_ONCE(container_of(push, struct vbw_session, push)->stopping);
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

	virtio_cread_le(to_device(session)->vdev, struct vballoon_config,
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

static void send_layout(struct vbw_session *session)
{
	WRITE_ONCE(session->send_layout, false);
	vbw_push_until(&session->push, stopping, stopping);
	vbw_push_start(&session->push, 0);
	if (!vbw_memmap_send(&session->push)) {
		session->layouts++;
		vbw_push_kick(&session->push);
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
	} while (READ_ONCE(session->changed) && !READ_ONCE(session->stopping));
}

/**
 * vbw_session_changed - the configuration changed: look at the command id
 * @vb: the device
 */
void vbw_session_changed(struct vbw_device *vb)
{
	if (!vb->vqs[VBW_VQ_WALK])
		return;
	WRITE_ONCE(vb->session.changed, true);
	wake_up(&vb->session.push.wait);
	vbw_queue_work(vb, vb->wq, &vb->session.work);
}

/**
 * vbw_session_memory_changed - the layout that was sent does not hold any more
 * @session: of a device that has a walk queue
 */
void vbw_session_memory_changed(struct vbw_session *session)
{
	struct vbw_device *vb = to_device(session);

	WRITE_ONCE(session->send_layout, true);
	vbw_queue_work(vb, vb->wq, &session->work);
}

/**
 * vbw_session_setup - allocate what rounds need, once for a device
 * @vb: the device
 *
 * Return: 0 or -ENOMEM.
 */
int vbw_session_setup(struct vbw_device *vb)
{
	INIT_LIST_HEAD(&vb->session.node);
	INIT_WORK(&vb->session.work, session_work);
	if (!vbw_has(vb, VBALLOON_F_FREE_PAGE_WALK))
		return 0;
	return vbw_push_init(&vb->session.push, vbw_buffer_count());
}

/**
 * vbw_session_free - undo vbw_session_setup()
 * @vb: the device
 */
void vbw_session_free(struct vbw_device *vb)
{
	if (vb->session.push.buffers)
		vbw_push_free(&vb->session.push);
}

/**
 * vbw_session_start - begin to serve rounds; the device is ready
 * @vb: the device
 */
void vbw_session_start(struct vbw_device *vb)
{
	struct vbw_session *session = &vb->session;

	if (!vb->vqs[VBW_VQ_WALK])
		return;
	session->round = 0;
	session->stopping = false;
	vbw_push_attach(&session->push, vb->vqs[VBW_VQ_WALK]);
	vbw_memmap_attach(session);
	vbw_session_memory_changed(session);
}

/**
 * vbw_session_stop - end rounds and layouts; the device is reset afterwards
 * @vb: the device
 */
void vbw_session_stop(struct vbw_device *vb)
{
	struct vbw_session *session = &vb->session;

	if (!vb->vqs[VBW_VQ_WALK])
		return;
	vbw_memmap_detach(session);
	WRITE_ONCE(session->stopping, true);
	wake_up(&session->push.wait);
	cancel_work_sync(&session->work);
}
