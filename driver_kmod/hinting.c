// SPDX-License-Identifier: GPL-2.0-only
/*
 * Free page hinting, as virtio_balloon does it: on the host's command the
 * largest free blocks are allocated one after the other and their addresses
 * sent, until no more is to be had; they are kept until the host is done, or
 * until the guest needs them.
 */
#include <linux/gfp.h>
#include <linux/jiffies.h>
#include <linux/mm.h>
#include <linux/scatterlist.h>
#include <linux/shrinker.h>

#include "compat.h"
#include "hinting.h"
#include "vballoon_walk_wire.h"

#define HINT_ORDER VBW_MAX_ORDER
#define HINT_PAGES BIT(HINT_ORDER)
#define HINT_WAIT_MS 10000	/* for the host to use one buffer */
#define HINT_GFP (__GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC)

static struct page *take_block(struct vbw_hinting *hinting)
{
	struct page *page;

	spin_lock_irq(&hinting->lock);
	page = list_first_entry_or_null(&hinting->blocks, struct page, lru);
	if (page) {
		list_del(&page->lru);
		hinting->nr_blocks--;
	}
	spin_unlock_irq(&hinting->lock);
	return page;
}

/*
 * Gives up to @max blocks back to the free lists; returns how many. Freeing may
 * clear or poison a whole block, so it is done without the lock.
 */
static unsigned long release(struct vbw_hinting *hinting, unsigned long max)
{
	struct page *page;
	unsigned long n;

	for (n = 0; n < max; n++) {
		page = take_block(hinting);
		if (!page)
			break;
		__free_pages(page, HINT_ORDER);
	}
	return n;
}

static void reclaim(struct virtqueue *vq)
{
	unsigned int len;

	while (virtqueue_get_buf(vq, &len))
		;
}

static u32 wanted_round(struct vbw_hinting *hinting)
{
	u32 id;

	/* Clear the flag before reading, so that a later change sets it again. */
	smp_store_mb(hinting->changed, false);
	virtio_cread_le(hinting->shared->vdev, struct vballoon_config, free_page_hint_cmd_id, &id);
	return id;
}

static bool aborted(struct vbw_hinting *hinting, u32 round)
{
	if (vbw_stopping(hinting->shared) || virtqueue_is_broken(hinting->vq))
		return true;
	if (!READ_ONCE(hinting->changed) || wanted_round(hinting) == round)
		return false;
	WRITE_ONCE(hinting->changed, true);
	return true;
}

/* Whether it may be aborted; for waits, where the command id must not be read. */
static bool disturbed(struct vbw_hinting *hinting)
{
	return vbw_stopping(hinting->shared) || READ_ONCE(hinting->changed) ||
	       virtqueue_is_broken(hinting->vq);
}

static bool have_room(struct virtqueue *vq, unsigned int nr)
{
	reclaim(vq);
	return vq->num_free >= nr;
}

/*
 * Whether there is room; if not, the device has been asked for an interrupt. With
 * room there is nothing to wait for, so the device is kept from sending one for
 * each block that it uses.
 */
static bool room_or_callback(struct virtqueue *vq, unsigned int nr)
{
	do {
		virtqueue_disable_cb(vq);
		if (have_room(vq, nr))
			return true;
	} while (!virtqueue_enable_cb(vq));
	return false;
}

/*
 * Waits for room, for a bounded time: a host that takes no hints must not keep
 * the blocks of the round. Returns 0, -ETIMEDOUT or -ECANCELED.
 */
static int wait_for_room(struct vbw_hinting *hinting, unsigned int nr,
			 bool (*over)(struct vbw_hinting *hinting))
{
	long left;

	left = wait_event_idle_timeout(hinting->shared->acked,
				       room_or_callback(hinting->vq, nr) || over(hinting),
				       msecs_to_jiffies(HINT_WAIT_MS));
	virtqueue_disable_cb(hinting->vq);
	if (!left)
		return -ETIMEDOUT;
	return have_room(hinting->vq, nr) ? 0 : -ECANCELED;
}

/* The end of a round is sent although the round is not wanted any more. */
static bool gone(struct vbw_hinting *hinting)
{
	return vbw_stopping(hinting->shared) || virtqueue_is_broken(hinting->vq);
}

/* A command id in the queue: the start of the hints of a round, or their end. */
static int send_id(struct vbw_hinting *hinting, __le32 *buffer, u32 id)
{
	struct virtqueue *vq = hinting->vq;
	struct scatterlist sg;
	int err;

	err = wait_for_room(hinting, 1, gone);
	if (err)
		return err;
	*buffer = cpu_to_le32(id);
	sg_init_one(&sg, buffer, sizeof(*buffer));
	err = virtqueue_add_outbuf(vq, &sg, 1, hinting, GFP_KERNEL);
	if (!err)
		virtqueue_kick(vq);
	return err;
}

/* One block: -ENOMEM when there is none, -ECANCELED or -ETIMEDOUT when none is taken. */
static int send_block(struct vbw_hinting *hinting, u32 round)
{
	struct virtqueue *vq = hinting->vq;
	struct scatterlist sg;
	struct page *page;
	int err;

	/* One entry stays free for the id that ends the round. */
	do {
		err = wait_for_room(hinting, 2, disturbed);
		if (err == -ETIMEDOUT)
			return err;
		if (aborted(hinting, round))
			return -ECANCELED;
	} while (err);
	page = alloc_pages(HINT_GFP, HINT_ORDER);
	if (!page)
		return -ENOMEM;
	sg_init_table(&sg, 1);
	sg_set_page(&sg, page, HINT_PAGES << PAGE_SHIFT, 0);
	err = virtqueue_add_inbuf(vq, &sg, 1, hinting, GFP_KERNEL);
	if (err) {
		__free_pages(page, HINT_ORDER);
		return err;
	}
	virtqueue_kick(vq);
	spin_lock_irq(&hinting->lock);
	list_add(&page->lru, &hinting->blocks);
	hinting->nr_blocks++;
	spin_unlock_irq(&hinting->lock);
	return 0;
}

static void run_round(struct vbw_hinting *hinting, u32 round)
{
	hinting->round = round;
	if (send_id(hinting, &hinting->start, round))
		return;
	while (!send_block(hinting, round))
		cond_resched();
	send_id(hinting, &hinting->stop, VBALLOON_CMD_ID_STOP);
}

static void hinting_work(struct work_struct *work)
{
	struct vbw_hinting *hinting = container_of(work, struct vbw_hinting, work);
	u32 id;

	do {
		id = wanted_round(hinting);
		if (id == VBALLOON_CMD_ID_DONE)
			release(hinting, ULONG_MAX);
		else if (id != VBALLOON_CMD_ID_STOP && id != hinting->round)
			run_round(hinting, id);
	} while (READ_ONCE(hinting->changed) && !vbw_stopping(hinting->shared));
}

/**
 * vbw_hinting_changed - the configuration changed: look at the command id
 * @hinting: the queue
 */
void vbw_hinting_changed(struct vbw_hinting *hinting)
{
	if (!hinting->vq)
		return;
	WRITE_ONCE(hinting->changed, true);
	wake_up(&hinting->shared->acked);
	vbw_queue_work(hinting->shared, hinting->wq, &hinting->work);
}

static unsigned long shrink_count(struct vbw_hinting *hinting)
{
	return READ_ONCE(hinting->nr_blocks) * HINT_PAGES;
}

static unsigned long shrink_scan(struct vbw_hinting *hinting, struct shrink_control *sc)
{
	unsigned long blocks = DIV_ROUND_UP(sc->nr_to_scan, HINT_PAGES);

	return release(hinting, blocks) * HINT_PAGES;
}

/*
 * Shrinkers are allocated since c42d50aefd17 ("mm: shrinker: add infrastructure
 * for dynamically allocating shrinker"), 6.7.
 */
#ifdef VBW_HAVE_SHRINKER_ALLOC
static unsigned long count_objects(struct shrinker *shrinker, struct shrink_control *sc)
{
	return shrink_count(shrinker->private_data);
}

static unsigned long scan_objects(struct shrinker *shrinker, struct shrink_control *sc)
{
	return shrink_scan(shrinker->private_data, sc);
}

static int add_shrinker(struct vbw_hinting *hinting)
{
	hinting->shrinker = shrinker_alloc(0, KBUILD_MODNAME);
	if (!hinting->shrinker)
		return -ENOMEM;
	hinting->shrinker->count_objects = count_objects;
	hinting->shrinker->scan_objects = scan_objects;
	hinting->shrinker->private_data = hinting;
	shrinker_register(hinting->shrinker);
	return 0;
}

static void remove_shrinker(struct vbw_hinting *hinting)
{
	shrinker_free(hinting->shrinker);
}
#else
static unsigned long count_objects(struct shrinker *shrinker, struct shrink_control *sc)
{
	return shrink_count(container_of(shrinker, struct vbw_hinting, shrinker));
}

static unsigned long scan_objects(struct shrinker *shrinker, struct shrink_control *sc)
{
	return shrink_scan(container_of(shrinker, struct vbw_hinting, shrinker), sc);
}

static int add_shrinker(struct vbw_hinting *hinting)
{
	hinting->shrinker.count_objects = count_objects;
	hinting->shrinker.scan_objects = scan_objects;
	hinting->shrinker.seeks = DEFAULT_SEEKS;
	return register_shrinker(&hinting->shrinker, KBUILD_MODNAME);
}

static void remove_shrinker(struct vbw_hinting *hinting)
{
	unregister_shrinker(&hinting->shrinker);
}
#endif

/**
 * vbw_hinting_setup - before anything else of this file
 * @hinting: to be filled in
 * @shared: of the device
 * @wq: for rounds, which may take long
 */
void vbw_hinting_setup(struct vbw_hinting *hinting, struct vbw_shared *shared,
		       struct workqueue_struct *wq)
{
	hinting->shared = shared;
	hinting->wq = wq;
	INIT_WORK(&hinting->work, hinting_work);
	INIT_LIST_HEAD(&hinting->blocks);
	spin_lock_init(&hinting->lock);
}

/**
 * vbw_hinting_start - features are negotiated, queues are there
 * @hinting: the queue
 *
 * Return: 0 or a negative error number.
 */
int vbw_hinting_start(struct vbw_hinting *hinting)
{
	if (!hinting->vq)
		return 0;
	/* One entry is for command ids, so there have to be two. */
	if (virtqueue_get_vring_size(hinting->vq) < 2)
		return -ENOSPC;
	return add_shrinker(hinting);
}

/**
 * vbw_hinting_cancel - wait for the work; the device stops
 * @hinting: the queue
 */
void vbw_hinting_cancel(struct vbw_hinting *hinting)
{
	cancel_work_sync(&hinting->work);
	hinting->round = 0;
}

/**
 * vbw_hinting_release - give every block back
 * @hinting: the queue; its work does not run
 */
void vbw_hinting_release(struct vbw_hinting *hinting)
{
	release(hinting, ULONG_MAX);
}

/**
 * vbw_hinting_stop - undo vbw_hinting_start()
 * @hinting: the queue; its work does not run
 */
void vbw_hinting_stop(struct vbw_hinting *hinting)
{
	if (vbw_has(hinting->shared, VBALLOON_F_FREE_PAGE_HINT))
		remove_shrinker(hinting);
	vbw_hinting_release(hinting);
}
